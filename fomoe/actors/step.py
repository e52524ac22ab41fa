"""One layer step of one device: who takes part, which arrays are written, what must travel."""

from __future__ import annotations

from dataclasses import dataclass, field

from fomoe.actors.channel import Receiver, Regions, Sender
from fomoe.actors.layout import StepViews
from fomoe.engine.transfers import SegmentSlots
from fomoe.engine.waves import StepArrays
from fomoe.model.buffers import F32


class StepBuffer:
    """One buffer of a device's step arena as the driver uses it; its views are made once."""

    def __init__(self, arena: str, number: int, views: StepViews) -> None:
        self.number = number
        self.arrays = StepArrays(
            views.order, views.weights, views.pair_token, views.pair_start, views.entries
        )
        self.arena = arena
        self.views = views
        self._rows: dict[int, tuple[F32, F32]] = {}
        self._regions: dict[tuple[int, int, int, int], Regions] = {}

    def rows(self, tokens: int) -> tuple[F32, F32]:
        """Return the input and the output of a step of `tokens` tokens, float32 [T, D]."""
        rows = self._rows.get(tokens)
        if rows is None:
            rows = self._rows[tokens] = (self.views.x[:tokens], self.views.out[:tokens])
        return rows

    def regions(self, tokens: int, n_experts: int, first: int, end: int) -> Regions:
        """Return the arena ranges that the device must see for entries `first` to `end`."""
        key = (tokens, n_experts, first, end)
        found = self._regions.get(key)
        if found is None:
            found = self._regions_of(*key)
            if tokens == 1:  # a decode step's ranges are few, a prompt's come once
                self._regions[key] = found
        return found

    def _regions_of(self, tokens: int, n_experts: int, first: int, end: int) -> Regions:
        views, at, name = self.views, self.views.offsets, self.arena
        size = views.entries.itemsize
        entries = (name, at["entries"] + first * size, (end - first) * size)
        if first:
            return (entries,)
        pairs = tokens * views.order.shape[1]
        return (
            entries,
            (name, at["x"], tokens * views.x.shape[1] * 4),
            (name, at["order"], pairs * 4),
            (name, at["weights"], pairs * 4),
            (name, at["pair_token"], pairs * 4),
            (name, at["pair_start"], (n_experts + 1) * 4),
        )


@dataclass(frozen=True, slots=True)
class DeviceLink:
    """The driver's ends of one device's rings and the buffers of its step arena.

    `shares_cores` says that it computes on the cores that the driver runs on.
    """

    name: str
    node: int
    shares_cores: bool
    sender: Sender
    receiver: Receiver
    buffers: tuple[StepBuffer, ...]


@dataclass(frozen=True, slots=True)
class NodeLink:
    """The driver's ends of one node's storage rings, and what lies in that node's segment."""

    name: str
    sender: Sender
    receiver: Receiver
    slots: SegmentSlots


@dataclass(frozen=True, slots=True)
class Links:
    """The driver's ends of all devices and nodes."""

    devices: list[DeviceLink]
    nodes: list[NodeLink]


@dataclass(slots=True)
class Step:
    """The layer under way; its experts stand in the wave planner."""

    device: DeviceLink
    buffer: StepBuffer
    id: int = 0
    layer: int = -1
    tokens: int = 0
    decoding: bool = False
    reads: int = 0  # experts asked for as demand that nobody had guessed
    guessed: int = 0  # wanted experts that a look-ahead had asked for
    waited_s: float = 0.0
    under_way: bool = field(default=False)
