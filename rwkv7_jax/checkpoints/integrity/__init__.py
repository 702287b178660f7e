"""Checks of files: what kind a file is, whether its bytes are those that were written."""
