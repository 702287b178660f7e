"""The kernels for Cloud TPUs."""
