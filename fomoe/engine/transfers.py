"""Turns residency plans into reads: which slot of a node's segment holds which expert's bytes.

On `cpu` devices the device tier and the RAM tier are one segment: moving an expert between them
moves an entry of the residency table and no byte. An expert's bytes therefore stay in one slot
from the read that brought them until neither tier holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.residency import Placement, Plan
from fomoe.types import ExpertKey, Tier


@dataclass(frozen=True, slots=True)
class SegmentClass:
    """Slots of one size in a segment: `count` slots of `slot_bytes`, from slot `first` on."""

    first: int
    count: int
    slot_bytes: int
    address: int  # of the first slot, relative to the end of the landed words


@dataclass(frozen=True, slots=True)
class Read:
    """An expert to read from its file into a slot; `address` is relative to the first slot."""

    expert: ExpertKey
    slot: int
    address: int
    generation: int


class SegmentSlots:
    """Slots of one node's segment and the experts in them.

    `layer_class` int [L] names each layer's size class, -1 for layers of other nodes. A slot's
    generation counts the reads into it; a read has landed when the slot's landed word has reached
    its generation.
    """

    def __init__(
        self, classes: dict[int, tuple[int, int]], layer_class: npt.NDArray[np.int32],
        n_experts: int,
    ) -> None:  # fmt: skip
        self.classes: dict[int, SegmentClass] = {}
        first = address = 0
        for number, (count, slot_bytes) in sorted(classes.items()):
            self.classes[number] = SegmentClass(first, count, slot_bytes, address)
            first, address = first + count, address + count * slot_bytes
        self.n_slots, self.nbytes = first, address
        self._layer_class = layer_class
        self._free = {
            number: list(range(c.first + c.count - 1, c.first - 1, -1))
            for number, c in self.classes.items()
        }
        self._slot = np.full((len(layer_class), n_experts), -1, np.int32)
        self._ram: dict[tuple[int, int], ExpertKey] = {}  # (class, RAM slot) of the residency
        self._generation = np.zeros(first, np.uint64)
        self._address = np.empty(first, np.int64)
        for c in self.classes.values():
            self._address[c.first : c.first + c.count] = (
                c.address + np.arange(c.count, dtype=np.int64) * c.slot_bytes
            )

    def apply(self, plan: Plan, is_resident: Callable[[ExpertKey], bool]) -> list[Read]:
        """Follow a plan: free what no tier holds any more, return the reads it needs in order.

        `is_resident` answers from the residency after the plan.
        """
        number = int(self._layer_class[plan.layer])
        reads = []
        for fetch in plan.fetches:
            key = ExpertKey(plan.layer, fetch.expert)
            leaving = [] if fetch.victim is None else [fetch.victim]
            for slot, holder in ((fetch.demoted_to, fetch.victim), (fetch.kept_in, key)):
                if slot >= 0 and holder is not None:
                    displaced = self._ram.get((number, slot))
                    self._ram[number, slot] = holder
                    if displaced is not None:
                        leaving.append(displaced)
            for gone in leaving:
                if not is_resident(gone):
                    self.forget(gone)
            if fetch.source == Tier.NVME:
                reads.append(self._assign(key))
        return reads

    def fill(self, placements: Iterable[Placement]) -> list[Read]:
        """Give slots to the experts of an initial fill; returns their reads."""
        reads = []
        for place in placements:
            if place.tier == Tier.RAM:
                self._ram[int(self._layer_class[place.key.layer]), place.slot] = place.key
            reads.append(self._assign(place.key))
        return reads

    def forget(self, key: ExpertKey) -> None:
        """Take back the slot of an expert that no tier holds any more."""
        slot = int(self._slot[key.layer, key.expert])
        if slot >= 0:
            self._slot[key.layer, key.expert] = -1
            self._free[int(self._layer_class[key.layer])].append(slot)

    def _assign(self, key: ExpertKey) -> Read:
        free = self._free[int(self._layer_class[key.layer])]
        assert free, f"no free slot for {key}"
        slot = free.pop()
        self._slot[key.layer, key.expert] = slot
        self._generation[slot] += 1
        return Read(key, slot, int(self._address[slot]), int(self._generation[slot]))

    def locate(
        self, layer: int, experts: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Return slots, addresses and generations of experts that have a slot."""
        slots = self._slot[layer, experts]
        return slots, self._address[slots], self._generation[slots]

    def is_current(self, key: ExpertKey, generation: int) -> bool:
        """Whether the expert's slot still waits for, or holds, that read."""
        slot = int(self._slot[key.layer, key.expert])
        return slot >= 0 and int(self._generation[slot]) == generation
