"""The segment of a node of GPUs: RAM tier and staging in host memory, beside slots in VRAM.

An expert has a slot of the segment while its bytes are nowhere else: they are being read, they wait
for their copy into VRAM, or the RAM tier holds them. The slots beyond those of the RAM tier are
the *staging* part; what passes through it on the way to VRAM leaves it when the copy has ended. Who
copies, and when, says `fomoe.engine.copies`; this class keeps the accounts. `VramSlots` (vram.h)
does the same on the same arrays for steps and guesses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from fomoe.engine.copies import COPY, CopyKind, Outcome
from fomoe.engine.transfers import Read, SegmentSlots
from fomoe.residency import Placement, Plan, Residency
from fomoe.types import ExpertKey, Tier

_Records = npt.NDArray[np.void]


class Reading(IntEnum):
    """What storage may be doing with a slot."""

    ENDED = 0  # nothing: what was read last has landed
    IDLE = 1  # a read that may be dropped
    DEMANDED = 2


@dataclass(frozen=True, slots=True, eq=False)
class VramLayout:
    """VRAM slots of a node's devices.

    Attributes:
        pools: slots by (device, class), of the node's devices alone.
        layer_device: int32 [L].
        layer_bytes: int64 [L], bytes of an expert of each layer.
        staging: slots by class that the segment has beside those of the RAM tier.
    """

    pools: Mapping[tuple[int, int], int]
    layer_device: npt.NDArray[np.int32]
    layer_bytes: npt.NDArray[np.int64]
    staging: Mapping[int, int]


class GpuSegment(SegmentSlots):
    """Slots of one node's segment, its devices' VRAM slots, and the copies between them.

    Attributes:
        users: int32 [slots], records that name a slot and are not answered.
        reading: int8 [slots], what storage may be doing, by `Reading`.
        holds: int64 [VRAM slots], whose bytes (layer * E + expert) lie there, -1 for nobody's.
        tickets: uint64 [VRAM slots], of the last LOAD into each.
        pool_first: int32 [L], where the layer's pool begins among the VRAM slots.
        staging: int32 [classes], slots beside those of the RAM tier.
        ahead: int32 [classes], records of ahead lists that are not answered.
        ticket: uint64 [1], the last one given out.
    """

    def __init__(
        self, classes: dict[int, tuple[int, int]], layer_class: npt.NDArray[np.int32],
        n_experts: int, vram: VramLayout,
    ) -> None:  # fmt: skip
        super().__init__(classes, layer_class, n_experts)
        first, n_vram = {}, 0
        for pool, count in sorted(vram.pools.items()):
            first[pool] = n_vram
            n_vram += count
        pools = zip(vram.layer_device.tolist(), self.layer_class.tolist(), strict=True)
        self.pool_first = np.array([first.get(pool, -1) for pool in pools], np.int32)
        self.users = np.zeros(self.n_slots, np.int32)
        self.reading = np.zeros(self.n_slots, np.int8)
        self.holds = np.full(n_vram, -1, np.int64)
        self.tickets = np.zeros(n_vram, np.uint64)
        self.staging = np.zeros_like(self.free_count)
        for number, count in vram.staging.items():
            self.staging[number] = count
        self.ahead = np.zeros_like(self.free_count)
        self.ticket = np.zeros(1, np.uint64)
        self._bytes: list[int] = vram.layer_bytes.tolist()

    def follow(
        self, plan: Plan, residency: Residency, *, ahead: bool
    ) -> tuple[list[Read], _Records]:
        """Follow a plan: returns its reads and its copies, demotions first.

        `residency` is in its state after the plan; a victim that finds no slot is dropped from it.
        """
        for fetch in plan.fetches:
            self.holds[self.pool_first[plan.layer] + fetch.slot] = -1
        copies = []
        for fetch in plan.fetches:
            key = ExpertKey(plan.layer, fetch.expert)
            for slot, holder in ((fetch.demoted_to, fetch.victim), (fetch.kept_in, key)):
                displaced = None if slot < 0 or holder is None else self._hold(holder, slot)
                if displaced is not None:
                    self.settle(displaced, residency)
            if fetch.victim is not None:
                copies += self._demote(fetch.victim, fetch.slot, residency, ahead)
                self.settle(fetch.victim, residency)
        reads = []
        for fetch in plan.fetches:
            key = ExpertKey(plan.layer, fetch.expert)
            if fetch.source == Tier.NVME:
                reads.append(self.read(key, ahead=ahead))
            copies.append(self.load(key, fetch.slot, ahead=ahead))
        return reads, np.array(copies, COPY)

    def bring(
        self, placements: Iterable[Placement], residency: Residency, *, ahead: bool
    ) -> tuple[list[Read], _Records, list[Placement]]:
        """Read experts that were placed in either tier, those of RAM first, and copy to VRAM.

        Returns:
            Reads, loads, and the placements in VRAM for which there is no staging slot yet: to be
            brought when answers have freed some.
        """
        reads, copies, rest = [], [], []
        for place in sorted(placements, key=lambda place: place.tier != Tier.RAM):
            if place.tier == Tier.RAM:
                self._hold(place.key, place.slot)
            elif self.spare(place.key.layer, residency) < 1:
                rest.append(place)
                continue
            reads.append(self.read(place.key, ahead=ahead))
            if place.tier == Tier.DEVICE:
                copies.append(self.load(place.key, place.slot, ahead=ahead))
        return reads, np.array(copies, COPY), rest

    def read(self, key: ExpertKey, *, ahead: bool) -> Read:
        """Give a slot to an expert that no tier holds, for a read of it."""
        read = self._assign(key)
        self.reading[read.slot] = Reading.IDLE if ahead else Reading.DEMANDED
        return read

    def load(self, key: ExpertKey, vram: int, *, ahead: bool) -> tuple[int, ...]:
        """Order the expert's bytes from its slot of the segment into a VRAM slot."""
        record = self._order(CopyKind.LOAD, key, vram, ahead)
        at = self.pool_first[key.layer] + vram
        self.tickets[at], self.holds[at] = self.ticket[0], -1
        return record

    def compute(self, key: ExpertKey) -> tuple[int, ...]:
        """Keep the expert's slot of the segment while it is computed there."""
        return self._order(CopyKind.COMPUTE, key, -1, False)

    def end(self, record: np.void, residency: Residency, *, ahead: bool, done: bool) -> bool:
        """A record was answered; returns whether the residency had to forget its expert."""
        layer, slot = int(record["layer"]), int(record["slot"])
        key = ExpertKey(layer, int(record["expert"]))
        self.users[slot] -= 1
        if ahead:
            self.ahead[self.layer_class[layer]] -= 1
        lost = False
        at = self.pool_first[layer] + record["vram"]
        if record["kind"] == CopyKind.LOAD and self.tickets[at] == record["ticket"]:
            if done:
                self.holds[at] = self._number(key)
            elif residency.device_slot(key) == record["vram"]:
                lost = not (self.stays_in_ram(key, residency) and residency.recall(key))
                if lost:
                    residency.forget(layer, np.array([key.expert], np.int32))
        if done and record["kind"] != CopyKind.DEMOTE:
            self.reading[slot] = Reading.ENDED
        if self.slot_of[layer, key.expert] == slot:
            self.settle(key, residency)
        elif self.users[slot] == 0:
            self._give_back(layer, slot)
        return lost

    def end_all(self, records: _Records, residency: Residency, *, aborted: bool = False) -> None:
        """A device has answered for the records of a sweep's wave."""
        for record in records[records["kind"] != CopyKind.CANCEL]:
            done = record["kind"] == CopyKind.DEMOTE or not aborted
            self.end(record, residency, ahead=False, done=done)

    def settle(self, key: ExpertKey, residency: Residency) -> None:
        """Take the slot from an expert that needs none; it is free when no record names it."""
        slot = int(self.slot_of[key.layer, key.expert])
        if slot < 0 or residency.is_in_ram(key):
            return
        if residency.holds(key) and not self.is_in_vram(key, residency):
            return
        self._release(key, slot)

    def drop(self, key: ExpertKey) -> _Records:
        """Take back the slot of an expert that no tier holds any more.

        Returns a CANCEL for its device where records still name the slot. Whatever became of the
        expert's read, one before it may still write to the slot: only a read is its next use.
        """
        slot = int(self.slot_of[key.layer, key.expert])
        if slot < 0:
            return np.empty(0, COPY)
        cancel = np.array([self.cancel(key)][: int(self.users[slot] > 0)], COPY)
        self._release(key, slot)
        return cancel

    def cancel(self, key: ExpertKey) -> tuple[int, ...]:
        """Return the CANCEL of an expert that its device was to bring ahead."""
        return self._record(CopyKind.CANCEL, key, -1, int(self.slot_of[key.layer, key.expert]))

    def all_landed(self) -> None:
        """Every read asked for so far has landed, as storage says after the initial fill."""
        self.reading[:] = Reading.ENDED

    def demand(self, key: ExpertKey) -> Read | None:
        """Return the read that has to be asked for again, as demand, if one may be dropped."""
        slot = int(self.slot_of[key.layer, key.expert])
        if slot < 0 or self.reading[slot] != Reading.IDLE:
            return None
        self.reading[slot] = Reading.DEMANDED
        return Read(key, slot, int(self.address[slot]), int(self.generation[slot]))

    def entry(self, key: ExpertKey, residency: Residency) -> tuple[int, int, int, int]:
        """Return the `ENTRY` of a step: in VRAM, on its way there, or computed in RAM."""
        vram = residency.device_slot(key)
        if vram >= 0 and self.is_in_vram(key, residency):
            return 0, 0, vram, key.expert
        slot = int(self.slot_of[key.layer, key.expert])
        where = ~slot if vram < 0 else vram
        return int(self.address[slot]), int(self.generation[slot]), where, key.expert

    def is_in_vram(self, key: ExpertKey, residency: Residency) -> bool:
        """Whether the expert's bytes lie in its VRAM slot."""
        vram = residency.device_slot(key)
        at = self.pool_first[key.layer] + vram
        return vram >= 0 and bool(self.holds[at] == self._number(key))

    def stays_in_ram(self, key: ExpertKey, residency: Residency) -> bool:
        """Whether the expert's bytes are in the segment for good: RAM keeps it without a LOAD."""
        slot = int(self.slot_of[key.layer, key.expert])
        return slot >= 0 and self.reading[slot] == Reading.ENDED and residency.is_in_ram(key)

    def spare(self, layer: int, residency: Residency) -> int:
        """Return the slots of the layer's class that the RAM tier can do without."""
        return int(self.free_count[self.layer_class[layer]]) - residency.ram_free(layer)

    def read_room(self, layer: int, residency: Residency) -> int:
        """Return how many experts of the layer's class a sweep may read now."""
        return max(0, self.spare(layer, residency))

    def guess_room(self, layer: int, residency: Residency) -> int:
        """Return how many experts of the layer's class a sweep may read ahead now."""
        return self._ahead_slots(layer, residency)

    def ahead_room(self, layer: int, residency: Residency) -> int:
        """Return how many experts of the layer's class a step may bring ahead.

        One expert takes up to two slots, for its read and for what it displaces.
        """
        return self._ahead_slots(layer, residency) // 2

    def _ahead_slots(self, layer: int, residency: Residency) -> int:
        """Return the slots that ahead lists may take: demand keeps half of the staging part."""
        number = self.layer_class[layer]
        staging = int(self.staging[number])
        left = staging - max(2, staging // 2) - int(self.ahead[number])
        return max(0, min(left, self.spare(layer, residency)))

    def _demote(
        self, key: ExpertKey, vram: int, residency: Residency, ahead: bool
    ) -> list[tuple[int, ...]]:
        """Bring a victim's bytes down, unless they lie, or will lie, in the segment anyhow."""
        if self.slot_of[key.layer, key.expert] >= 0 or not residency.is_in_ram(key):
            return []
        slot = self._take_quiet(int(self.layer_class[key.layer]))
        if slot < 0:
            residency.drop_demoted(key)
            return []
        self.slot_of[key.layer, key.expert] = slot
        self.generation[slot] += np.uint64(1)
        return [self._order(CopyKind.DEMOTE, key, vram, ahead)]

    def _take_quiet(self, number: int) -> int:
        """Take the free slot nearest the top of the stack that storage is not writing to."""
        stack = self.free_slots[self.class_first[number] :][: self.free_count[number]]
        quiet = np.flatnonzero(self.reading[stack] == Reading.ENDED)
        if not quiet.size:
            return -1
        at = quiet[-1]
        stack[at], stack[-1] = stack[-1], stack[at]
        self.free_count[number] -= 1
        return int(stack[-1])

    def _release(self, key: ExpertKey, slot: int) -> None:
        self.slot_of[key.layer, key.expert] = -1
        if self.users[slot] == 0:
            self._give_back(key.layer, slot)

    def _give_back(self, layer: int, slot: int) -> None:
        number = self.layer_class[layer]
        self.free_slots[self.class_first[number] + self.free_count[number]] = slot
        self.free_count[number] += 1

    def _order(self, kind: CopyKind, key: ExpertKey, vram: int, ahead: bool) -> tuple[int, ...]:
        slot = int(self.slot_of[key.layer, key.expert])
        assert slot >= 0, f"{key} has no slot of the segment"
        self.users[slot] += 1
        if ahead:
            self.ahead[self.layer_class[key.layer]] += 1
        self.ticket += np.uint64(1)
        return self._record(kind, key, vram, slot)

    def _record(self, kind: CopyKind, key: ExpertKey, vram: int, slot: int) -> tuple[int, ...]:
        return (int(self.address[slot]), int(self.generation[slot]), int(self.ticket[0]),
                self._bytes[key.layer], int(kind), key.layer, key.expert, vram, slot,
                int(Outcome.OPEN))  # fmt: skip

    def _number(self, key: ExpertKey) -> int:
        return key.layer * self.slot_of.shape[1] + key.expert
