"""Checkpoints of a run: what is written, what is checked, which are kept."""
