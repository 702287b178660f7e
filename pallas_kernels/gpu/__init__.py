"""Kernels for NVIDIA GPUs, in Pallas and in Triton."""
