"""Synthetic tasks: rows of tokens with known answers."""
