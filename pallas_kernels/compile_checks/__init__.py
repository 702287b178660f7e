"""Checks that compile the kernels for absent devices and compare the results with a table."""
