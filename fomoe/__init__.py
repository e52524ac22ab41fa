"""Runs mixture-of-experts models several times larger than VRAM + RAM."""
