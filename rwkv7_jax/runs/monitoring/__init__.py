"""What a run shows and records while it works: log, progress bar, profile, plots."""
