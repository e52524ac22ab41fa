"""The RAM tier: what happens in host memory when an expert moves into a device slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fomoe.residency.counters import Counters
from fomoe.residency.policy import EvictionPolicy, History
from fomoe.residency.reference.victims import VictimQueue
from fomoe.residency.slots import SlotTable
from fomoe.types import ExpertKey

Victim = tuple[float, ExpertKey] | None


class RamTier(ABC):
    """Common part: the slot table and the queue of what a plan may drop from it."""

    def __init__(self, table: SlotTable, counters: Counters) -> None:
        self.table = table
        self._counters = counters

    def _room(self, layer: int, queue: VictimQueue, worth: float) -> int:
        """Charge a slot to the layer for an entry of this worth; -1 if it is not worth one."""
        if self.table.free(layer):
            return self.table.take(layer)
        least = queue.peek(layer)
        if least is None:
            return -1
        value, key = least
        # A layer below its quota has a right to a slot; inside a layer, worth decides.
        if key.layer == layer and value >= worth:
            return -1
        queue.pop(key)
        self._counters.ram_drops[key.layer] += 1
        return self.table.take_from(key, layer)

    @abstractmethod
    def use(self, layer: int, experts: npt.NDArray[np.int32], step: int) -> None:
        """Experts are used where they lie, in RAM."""

    @abstractmethod
    def queue(
        self,
        values: Callable[[int], npt.NDArray[np.float64]],
        blocked: Callable[[int], npt.NDArray[np.bool_]],
        followed: npt.NDArray[np.bool_] | None,
    ) -> VictimQueue:
        """Return a plan's queue of RAM victims; `values` ranks by use of the whole cache."""

    @abstractmethod
    def promote(self, key: ExpertKey, victim: Victim, queue: VictimQueue, step: int) -> int:
        """Expert `key` moves from RAM to the device; return where the victim goes (-1 nowhere)."""

    @abstractmethod
    def read(
        self, key: ExpertKey, victim: Victim, queue: VictimQueue, step: int
    ) -> tuple[int, int]:
        """Expert `key` comes from NVMe; return where the victim goes and a copy stays (or -1)."""


class ExclusiveRam(RamTier):
    """RAM holds what the device does not: victims move down, promotions leave no copy."""

    def use(self, layer: int, experts: npt.NDArray[np.int32], step: int) -> None:
        """Nothing: both tiers rank by the same worth."""

    def queue(
        self,
        values: Callable[[int], npt.NDArray[np.float64]],
        blocked: Callable[[int], npt.NDArray[np.bool_]],
        followed: npt.NDArray[np.bool_] | None,
    ) -> VictimQueue:
        """Both tiers rank by the same worth."""
        return VictimQueue(self.table, values, blocked, followed)

    def promote(self, key: ExpertKey, victim: Victim, queue: VictimQueue, step: int) -> int:
        """Exchange the two; without a victim the RAM slot becomes free."""
        if victim is None:
            self.table.give_up(key.layer, key.expert)
            return -1
        loser = victim[1]
        slot = self.table.take_from(key, loser.layer)
        self.table.assign(loser.layer, loser.expert, slot)
        return slot

    def read(
        self, key: ExpertKey, victim: Victim, queue: VictimQueue, step: int
    ) -> tuple[int, int]:
        """Move the victim to RAM unless it is worth no more than what would leave for it."""
        if victim is None:
            return -1, -1
        worth, loser = victim
        slot = self._room(loser.layer, queue, worth)
        if slot >= 0:
            self.table.assign(loser.layer, loser.expert, slot)
        return slot, -1


class InclusiveRam(RamTier):
    """Every read from NVMe leaves a copy in RAM, promotions keep theirs, victims are dropped.

    RAM ranks by its own history, of reads and promotions: what the device serves well gets old
    here, as in a page cache below an application's cache.
    """

    def __init__(
        self, table: SlotTable, counters: Counters, policy: EvictionPolicy, history: History
    ) -> None:
        super().__init__(table, counters)
        self._history = history
        self._policy = policy

    def use(self, layer: int, experts: npt.NDArray[np.int32], step: int) -> None:
        """Count a use of the copies."""
        self._history.touch(layer, experts, step)
        self._history.steps[layer] = step

    def queue(
        self,
        values: Callable[[int], npt.NDArray[np.float64]],
        blocked: Callable[[int], npt.NDArray[np.bool_]],
        followed: npt.NDArray[np.bool_] | None,
    ) -> VictimQueue:
        """Rank by this tier's own history."""
        return VictimQueue(self.table, self._values, blocked, followed)

    def promote(self, key: ExpertKey, victim: Victim, queue: VictimQueue, step: int) -> int:
        """Count a use of the copy; the victim is dropped."""
        self._touch(key, step)
        return -1

    def read(
        self, key: ExpertKey, victim: Victim, queue: VictimQueue, step: int
    ) -> tuple[int, int]:
        """Keep a copy if any slot can be had; the victim is dropped."""
        slot = self._room(key.layer, queue, float("inf"))
        if slot >= 0:
            self.table.assign(key.layer, key.expert, slot)
            self._touch(key, step)
        return -1, slot

    def _touch(self, key: ExpertKey, step: int) -> None:
        self._history.touch(key.layer, key.expert, step)
        self._history.steps[key.layer] = step

    def _values(self, layer: int) -> npt.NDArray[np.float64]:
        history = self._history
        step = int(history.steps[layer])
        return self._policy.values(history.uses[layer], history.last[layer], step)
