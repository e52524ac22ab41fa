"""Compute: the device protocol and the kernels of each device."""
