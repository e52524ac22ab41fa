"""Experts on their way from a node's segment into a device's slots, beside what it computes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import load_acquire_u64
from fomoe.gguf.extents import ExpertTable

if TYPE_CHECKING:
    from fomoe.kernels.gpu.runtime import Runtime

MOST_IN_FLIGHT = 16


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


@dataclass(frozen=True, slots=True)
class Source:
    """The segment as a device sees it.

    Attributes:
        landed: uint64 [slots], the generation that has landed in each.
        address: where its first slot begins.
    """

    landed: npt.NDArray[np.uint64]
    address: int


Record = tuple[int, int, int, int, int, int]  # the fields of `COPY`


class ExpertCopies:
    """Copies in the order asked for, on a stream of their own; waits for nothing.

    An expert counts as resident when its copy has ended.
    """

    def __init__(self, runtime: Runtime, slots: Slots, source: Source, table: ExpertTable) -> None:
        self._runtime = runtime
        self._slots = slots
        self._source = source
        self._stream = runtime.stream()
        self._events = [runtime.event() for _ in range(MOST_IN_FLIGHT)]
        self._offsets = [table.part_offset_array(i) for i in range(table.n_layers)]
        self._sizes = [part_bytes(table, i) for i in range(table.n_layers)]
        self._waiting: deque[Record] = deque()
        self._under_way: deque[tuple[int, Record]] = deque()
        self.nbytes = 0

    @property
    def under_way(self) -> bool:
        """Whether a copy has begun and not ended."""
        return bool(self._under_way)

    def ask(self, records: npt.NDArray[np.void]) -> None:
        """Take records of `COPY`; their slots on the device must be free by then."""
        self._waiting.extend(records.tolist())

    def advance(self) -> int:
        """Begin what has landed; returns how many copies have ended since the last call."""
        ended = self._collect()
        while self._waiting and self._events and self._has_landed(self._waiting[0]):
            record = self._waiting.popleft()
            self._begin(record)
            event = self._events.pop()
            self._runtime.record(event, self._stream)
            self._under_way.append((event, record))
        return ended

    def _has_landed(self, record: Record) -> bool:
        _, generation, slot, *_ = record
        return bool(load_acquire_u64(self._source.landed, slot) >= generation)

    def _begin(self, record: Record) -> None:
        address, _, _, layer, expert, to = record
        slots, start = self._slots, self._source.address + address
        base = slots.slot_address(slots.class_of(layer), to)
        parts = zip(
            slots.layout(layer).offsets, self._offsets[layer][expert].tolist(),
            self._sizes[layer], strict=True,
        )  # fmt: skip
        for there, here, nbytes in parts:
            self._runtime.copy(base + there, start + here, nbytes, self._stream)
            self.nbytes += nbytes

    def _collect(self) -> int:
        ended, layers = 0, set()
        while self._under_way and self._runtime.done(self._under_way[0][0]):
            event, (_, _, _, layer, expert, to) = self._under_way.popleft()
            self._events.append(event)
            self._slots.set(layer, expert, to)
            layers.add(layer)
            ended += 1
        for layer in layers:
            self._slots.publish(layer)
        return ended


def part_bytes(table: ExpertTable, layer: int) -> tuple[int, int, int]:
    """Return the bytes of gate, up and down of an expert of the layer."""
    sizes = table.stride[layer].tolist()
    if len(sizes) == 2:  # fused: the gate's rows lie before the up projection's
        return sizes[0] // 2, sizes[0] // 2, sizes[1]
    return sizes[0], sizes[1], sizes[2]
