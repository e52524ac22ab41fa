"""Slot pools of one tier: which expert holds which slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fomoe.types import ExpertKey

Pool = tuple[int, int]  # (device or node, size class)


class SlotTable:
    """The pools of one tier; a pool is shared by all layers that name it.

    Each layer has a quota: its pool's slots over the pool's layers, the remainder to the first.
    All arrays are int32 and stay where they are: the native rules read and write them.

    Attributes:
        slot_of: [L, E], the slot that an expert holds, -1 for none.
        held: [L], slots that each layer holds.
        quota: [L], each layer's fair share.
        size: [L], slots of each layer's pool.
        pool: [L], number of each layer's pool.
        members: [L], the layers, pool by pool, ascending in a pool.
        member_start: [pools + 1], where a pool's members begin.
        free_slots: one stack of free slots per pool, from `free_start[pool]` on.
        free_count: [pools], the height of each stack.
        free_start: [pools].
    """

    def __init__(
        self, n_experts: int, pools: Sequence[Pool], pool_slots: Mapping[Pool, int]
    ) -> None:
        n_layers = len(pools)
        by_pool: dict[Pool, list[int]] = {}
        for layer, pool in enumerate(pools):
            by_pool.setdefault(pool, []).append(layer)
        number = {pool: i for i, pool in enumerate(by_pool)}
        sizes = [pool_slots.get(pool, 0) for pool in by_pool]
        self.slot_of = np.full((n_layers, n_experts), -1, dtype=np.int32)
        self.held = np.zeros(n_layers, dtype=np.int32)
        self.quota = np.zeros(n_layers, dtype=np.int32)
        self.size = np.array([pool_slots.get(pool, 0) for pool in pools], dtype=np.int32)
        self.pool = np.array([number[pool] for pool in pools], dtype=np.int32)
        self.members = np.array([m for ms in by_pool.values() for m in ms], dtype=np.int32)
        self.member_start = _starts([len(members) for members in by_pool.values()])
        self.free_start = _starts(sizes)[:-1].copy()
        self.free_count = np.array(sizes, dtype=np.int32)
        # The last one is taken first.
        stacks = [np.arange(size - 1, -1, -1, dtype=np.int32) for size in sizes]
        self.free_slots = np.concatenate(stacks) if stacks else np.empty(0, dtype=np.int32)
        self._lent: set[tuple[int, int]] = set()  # pool, slot
        for pool, layers in by_pool.items():
            share, rest = divmod(pool_slots.get(pool, 0), len(layers))
            self.quota[layers] = share
            self.quota[layers[:rest]] += 1

    def sharers(self, layer: int) -> list[int]:
        """Return the layers that share the layer's pool, itself included, ascending."""
        first, end = self.member_start[self.pool[layer] :][:2]
        members: list[int] = self.members[first:end].tolist()
        return members

    def free(self, layer: int) -> int:
        """Return the number of free slots in the layer's pool."""
        return int(self.free_count[self.pool[layer]])

    def take(self, layer: int) -> int:
        """Charge a free slot to the layer and return it; `assign` must follow."""
        pool = self.pool[layer]
        self.held[layer] += 1
        self.free_count[pool] -= 1
        return int(self.free_slots[self.free_start[pool] + self.free_count[pool]])

    def take_from(self, victim: ExpertKey, layer: int) -> int:
        """Evict `victim`, charge its slot to the layer and return it; `assign` must follow."""
        slot = int(self.slot_of[victim.layer, victim.expert])
        self.slot_of[victim.layer, victim.expert] = -1
        self.held[victim.layer] -= 1
        self.held[layer] += 1
        return slot

    def assign(self, layer: int, expert: int, slot: int) -> None:
        """Put the expert into a slot that the layer was charged for."""
        self.slot_of[layer, expert] = slot

    def give_up(self, layer: int, expert: int) -> int:
        """Free the slot that the expert holds and return it."""
        slot = int(self.slot_of[layer, expert])
        self.slot_of[layer, expert] = -1
        self.held[layer] -= 1
        pool = self.pool[layer]
        self.free_slots[self.free_start[pool] + self.free_count[pool]] = slot
        self.free_count[pool] += 1
        return slot

    def lend(self, layer: int) -> int:
        """Return a free slot of the layer's pool that nobody is charged for."""
        pool = int(self.pool[layer])
        assert self.free_count[pool] > 0, "no slot to lend"
        self.free_count[pool] -= 1
        slot = int(self.free_slots[self.free_start[pool] + self.free_count[pool]])
        self._lent.add((pool, slot))
        return slot

    def take_back(self, layer: int, slot: int) -> None:
        """Free a lent slot."""
        pool = int(self.pool[layer])
        self._lent.remove((pool, slot))
        self.free_slots[self.free_start[pool] + self.free_count[pool]] = slot
        self.free_count[pool] += 1

    def check(self) -> None:
        """Assert that every slot is free, lent, or held by exactly one expert."""
        for pool, count in enumerate(self.free_count.tolist()):
            members = self.members[self.member_start[pool] : self.member_start[pool + 1]]
            slots = self.slot_of[members]
            free = self.free_slots[self.free_start[pool] :][:count]
            lent = [slot for where, slot in self._lent if where == pool]
            used = np.sort(np.concatenate([slots[slots >= 0], free, np.array(lent, np.int32)]))
            assert np.array_equal(used, np.arange(self.size[members[0]])), (pool, used)
            held = self.held[members]
            assert np.array_equal((slots >= 0).sum(axis=1), held), (pool, held)


def _starts(counts: Sequence[int]) -> npt.NDArray[np.int32]:
    """Return int32 [n + 1]: where each of n consecutive runs begins, and the end."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int32)]).astype(np.int32)
