"""Kernels for Cloud TPUs."""
