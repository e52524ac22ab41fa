"""Names of processes, arenas and actors; the one place that spells them."""

from __future__ import annotations

NAMESPACE = "fomoe"
CLIENT = "client"
DRIVER = "driver"
STORAGE = "storage"
ARM_NODE = 0  # where experts are computed in RAM beside GPUs: the driver's node alone


def device_name(device: int) -> str:
    """Return the process name of a device actor."""
    return f"gpu-{device}"


def storage_name(node: int) -> str:
    """Return the process name of a node's storage actor."""
    return f"{STORAGE}-{node}"


def arena_name(device: int) -> str:
    """Return the name of a device's step arena."""
    return f"step-{device}"
