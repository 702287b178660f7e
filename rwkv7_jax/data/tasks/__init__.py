"""Synthetic tasks: rows of tokens whose answers are known."""
