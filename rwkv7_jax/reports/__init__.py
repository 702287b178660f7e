"""What people read after a run. Reads a run's files; imports no training."""
