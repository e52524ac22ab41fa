"""Where the parts of experts lie: in the slots of a device and in those of a node's segment."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from fomoe.gguf.extents import ExpertTable

U64 = npt.NDArray[np.uint64]


class SlotLayout(Protocol):
    """How an expert lies in its slot."""

    @property
    def offsets(self) -> tuple[int, int, int]:
        """Where gate, up and down begin."""


class Slots(Protocol):
    """A device's places for experts."""

    def class_of(self, layer: int) -> int:
        """Return the class of the layer's slots."""

    def layout(self, layer: int) -> SlotLayout:
        """Return how an expert of the layer lies in its slot."""

    def slot_address(self, size_class: int, slot: int) -> int:
        """Return where a slot begins on the device."""

    def set(self, layer: int, expert: int, slot: int | None) -> None:
        """Note that the expert lies in a slot of its layer's class, or (None) nowhere."""

    def publish(self, layer: int | None = None) -> None:
        """Tell the device's own table of a layer (None: of all)."""


class ExpertParts:
    """Where the parts of a layer's experts lie, made once: loads are on a layer's way.

    Attributes:
        size_class: of the layer.
        in_slot: offsets in a VRAM slot.
        in_segment: offsets in a slot of the segment, by expert.
        sizes: bytes.
    """

    __slots__ = ("in_segment", "in_slot", "size_class", "sizes")

    def __init__(self, slots: Slots, table: ExpertTable, layer: int) -> None:
        self.size_class = slots.class_of(layer)
        self.in_slot = slots.layout(layer).offsets
        self.in_segment: list[list[int]] = table.part_offset_array(layer).tolist()
        self.sizes = part_bytes(table, layer)


def segment_parts(table: ExpertTable, first: int) -> list[U64]:
    """Return where gate, up and down of experts lie in a segment whose first slot is at `first`.

    Of each layer, uint64 [3, E], before the slot's own address is added.
    """
    offsets = (table.part_offset_array(i).T.astype(np.uint64) for i in range(table.n_layers))
    return [np.ascontiguousarray(part) + np.uint64(first) for part in offsets]


def part_bytes(table: ExpertTable, layer: int) -> tuple[int, int, int]:
    """Return the bytes of gate, up and down of an expert of the layer."""
    sizes = table.stride[layer].tolist()
    if len(sizes) == 2:  # fused: the gate's rows lie before the up projection's
        return sizes[0] // 2, sizes[0] // 2, sizes[1]
    return sizes[0], sizes[1], sizes[2]
