"""Sequences, caches, the layer loop, sampling."""
