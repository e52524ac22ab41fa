"""CPU kernels: native module, typed wrappers."""
