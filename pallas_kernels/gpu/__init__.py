"""The kernels for NVIDIA GPUs: Pallas's and Triton's."""
