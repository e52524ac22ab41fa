"""Slot segment and direct reads of experts."""
