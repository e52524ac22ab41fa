"""The arrays of a residency; Python and the native rules work on the same ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fomoe.residency.counters import Counters
from fomoe.residency.policy import History
from fomoe.residency.slots import SlotTable
from fomoe.residency.topology import Topology


class Flags:
    """Marks of experts on the device, bool [L, E], and two of them counted, int32 [L].

    Attributes:
        pinned: part of a plan that is not released yet.
        awaited: prefetched for a plan yet to come.
        unused: prefetched and not wanted so far.
        last_wanted: of the layer's last plan.
        n_pinned: how many are pinned.
        n_awaited: how many are awaited.
    """

    def __init__(self, n_layers: int, n_experts: int) -> None:
        shape = n_layers, n_experts
        self.pinned = np.zeros(shape, dtype=np.bool_)
        self.awaited = np.zeros(shape, dtype=np.bool_)
        self.unused = np.zeros(shape, dtype=np.bool_)
        self.last_wanted = np.zeros(shape, dtype=np.bool_)
        self.n_pinned = np.zeros(n_layers, dtype=np.int32)
        self.n_awaited = np.zeros(n_layers, dtype=np.int32)

    def recount(self) -> None:
        """Count again what is pinned and awaited."""
        self.pinned.sum(axis=1, out=self.n_pinned)
        self.awaited.sum(axis=1, out=self.n_awaited)


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """All that a residency remembers; no array is ever replaced by another.

    `history` counts the wishes of plans; `ram_history` reads and promotions, with an inclusive
    RAM tier only.
    """

    device: SlotTable
    ram: SlotTable
    history: History
    ram_history: History
    flags: Flags
    counters: Counters

    @classmethod
    def empty(cls, topology: Topology) -> State:
        """Return the state of a cache that holds nothing."""
        n_layers, n_experts = topology.n_layers, topology.n_experts
        return cls(
            device=SlotTable(n_experts, topology.device_pools(), topology.device_slots),
            ram=SlotTable(n_experts, topology.ram_pools(), topology.ram_slots),
            history=History(n_layers, n_experts),
            ram_history=History(n_layers, n_experts),
            flags=Flags(n_layers, n_experts),
            counters=Counters.zeros(n_layers),
        )
