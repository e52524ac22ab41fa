"""Where a model's layers live and how many expert slots each memory has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError

RamPolicy = Literal["exclusive", "inclusive"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Topology:
    """Slots by memory and size class, and which layer uses which.

    `layer_device` and `layer_class` are int32 [L]. `device_slots` counts slots by (device, class),
    `ram_slots` by (node, class); a missing RAM entry means no slots. `device_node[d]` is the node
    that device d sits on: that node's RAM serves the layers of the device.

    Raises:
        ConfigError: shapes differ, an index is out of range, or a layer has no device slot.
    """

    n_layers: int
    n_experts: int
    layer_device: npt.NDArray[np.int32]
    layer_class: npt.NDArray[np.int32]
    device_slots: Mapping[tuple[int, int], int]
    ram_slots: Mapping[tuple[int, int], int]
    device_node: tuple[int, ...]

    def __post_init__(self) -> None:
        shape = (self.n_layers,)
        if self.layer_device.shape != shape or self.layer_class.shape != shape:
            raise ConfigError(
                f"{self.n_layers} layers, but layer_device has shape {self.layer_device.shape} "
                f"and layer_class {self.layer_class.shape}"
            )
        if min([*self.device_slots.values(), *self.ram_slots.values()], default=0) < 0:
            raise ConfigError("a slot count is negative")
        for layer, (device, size_class) in enumerate(self.device_pools()):
            if not 0 <= device < len(self.device_node):
                raise ConfigError(
                    f"layer {layer} is on device {device} of {len(self.device_node)} devices"
                )
            if self.device_slots.get((device, size_class), 0) < 1:
                raise ConfigError(
                    f"layer {layer} has no slot of class {size_class} on device {device}"
                )

    def device_pools(self) -> list[tuple[int, int]]:
        """Return each layer's (device, class)."""
        return list(zip(self.layer_device.tolist(), self.layer_class.tolist(), strict=True))

    def ram_pools(self) -> list[tuple[int, int]]:
        """Return each layer's (node, class)."""
        return [(self.device_node[d], size_class) for d, size_class in self.device_pools()]
