"""Which expert lies in which slot of which tier; pure."""
