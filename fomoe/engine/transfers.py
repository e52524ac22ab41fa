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

# A read as storage takes it: `address` is relative to the first slot, `bell` the device to wake.
READ = np.dtype(
    [
        ("address", "<i8"),
        ("generation", "<u8"),
        ("slot", "<i4"),
        ("layer", "<i4"),
        ("expert", "<i4"),
        ("priority", "<i4"),
        ("bell", "<i4"),
        ("reserved", "<i4"),
    ]
)
# One expert of a step: where its bytes lie in the segment and which landed word says so.
ENTRY = np.dtype([("address", "<i8"), ("generation", "<u8"), ("slot", "<i4"), ("expert", "<i4")])


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
    its generation. No array is ever replaced by another: the native planner works on them, too.

    Attributes:
        slot_of: int32 [L, E], the slot that has an expert's bytes, -1 for none.
        holder: int64 [slots], which expert (layer * E + id) a RAM slot of the residency has held
            last, -1 for none; by the first slot of its class plus the RAM slot.
        generation: uint64 [slots].
        address: int64 [slots], relative to the first slot.
        free_slots: int32 [slots], a stack of free slots per class from `class_first` on.
        free_count: int32 [classes], the height of each stack.
        class_first: int32 [classes], 0 for classes without slots.
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
        self.layer_class = np.ascontiguousarray(layer_class, dtype=np.int32)
        self.slot_of = np.full((len(layer_class), n_experts), -1, np.int32)
        self.holder = np.full(first, -1, np.int64)
        self.generation = np.zeros(first, np.uint64)
        self.address = np.empty(first, np.int64)
        self.free_slots = np.empty(first, np.int32)
        self.class_first, self.free_count = np.zeros((2, max(classes, default=0) + 1), np.int32)
        for number, c in self.classes.items():
            slots = np.arange(c.count)
            here = slice(c.first, c.first + c.count)
            self.address[here] = c.address + slots * c.slot_bytes
            self.free_slots[here] = c.first + slots[::-1]  # the last one is taken first
            self.class_first[number], self.free_count[number] = c.first, c.count

    def apply(self, plan: Plan, is_resident: Callable[[ExpertKey], bool]) -> list[Read]:
        """Follow a plan: free what no tier holds any more, return the reads it needs in order.

        `is_resident` answers from the residency after the plan.
        """
        reads = []
        for fetch in plan.fetches:
            key = ExpertKey(plan.layer, fetch.expert)
            leaving = [] if fetch.victim is None else [fetch.victim]
            for slot, holder in ((fetch.demoted_to, fetch.victim), (fetch.kept_in, key)):
                if slot >= 0 and holder is not None:
                    displaced = self._hold(holder, slot)
                    leaving += [] if displaced is None else [displaced]
            for gone in leaving:
                if not is_resident(gone):
                    self.forget(gone)
            if fetch.source == Tier.NVME:
                reads.append(self._assign(key))
        return reads

    def _hold(self, key: ExpertKey, ram_slot: int) -> ExpertKey | None:
        """A RAM slot of the residency goes to `key`; returns who had it last."""
        n_experts = self.slot_of.shape[1]
        at = self.class_first[self.layer_class[key.layer]] + ram_slot
        before = int(self.holder[at])
        self.holder[at] = key.layer * n_experts + key.expert
        return None if before < 0 else ExpertKey(*divmod(before, n_experts))

    def fill(self, placements: Iterable[Placement]) -> list[Read]:
        """Give slots to the experts of an initial fill; returns their reads."""
        reads = []
        for place in placements:
            if place.tier == Tier.RAM:
                self._hold(place.key, place.slot)
            reads.append(self._assign(place.key))
        return reads

    def forget(self, key: ExpertKey) -> None:
        """Take back the slot of an expert that no tier holds any more."""
        slot = int(self.slot_of[key.layer, key.expert])
        if slot >= 0:
            self.slot_of[key.layer, key.expert] = -1
            number = self.layer_class[key.layer]
            self.free_slots[self.class_first[number] + self.free_count[number]] = slot
            self.free_count[number] += 1

    def _assign(self, key: ExpertKey) -> Read:
        number = self.layer_class[key.layer]
        assert self.free_count[number] > 0, f"no free slot for {key}"
        self.free_count[number] -= 1
        slot = int(self.free_slots[self.class_first[number] + self.free_count[number]])
        self.slot_of[key.layer, key.expert] = slot
        self.generation[slot] += np.uint64(1)
        return Read(key, slot, int(self.address[slot]), int(self.generation[slot]))

    def locate(
        self, layer: int, experts: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Return slots, addresses and generations of experts that have a slot."""
        slots = self.slot_of[layer, experts]
        return slots, self.address[slots], self.generation[slots]

    def is_current(self, key: ExpertKey, slot: int, generation: int) -> bool:
        """Whether the expert's slot is that one and still waits for, or holds, that read."""
        is_mine = int(self.slot_of[key.layer, key.expert]) == slot
        return is_mine and int(self.generation[slot]) == generation
