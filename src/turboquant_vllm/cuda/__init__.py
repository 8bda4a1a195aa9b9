"""Native NVIDIA kernels for the hot path, compiled at first use."""
