"""The CPU backend: fused numba kernels."""
