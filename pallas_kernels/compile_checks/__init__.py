"""Checks that compile the kernels for absent devices and compare the result with a table."""
