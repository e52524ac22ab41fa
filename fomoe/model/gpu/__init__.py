"""A model's layers on a GPU, out of the launches of `fomoe.kernels.gpu`."""
