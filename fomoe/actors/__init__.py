"""Processes on Ray and the channel between them."""
