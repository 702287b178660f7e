"""Compiles the kernels for devices that are not here and holds them to a table."""
