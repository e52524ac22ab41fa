"""Kernels of fomoe/kernels/hip on AMD and NVIDIA cards, and on a CPU that stands in for one."""
