"""Strings and bytes to token ids and back, at once or as a stream. Imports nothing of ours."""
