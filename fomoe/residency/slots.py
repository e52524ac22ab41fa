"""Slot pools of one tier: which expert holds which slot, and whose turn it is to give one up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fomoe.types import ExpertKey

Pool = tuple[int, int]  # (device or node, size class)


class SlotTable:
    """The pools of one tier; a pool is shared by all layers that name it.

    Each layer has a quota: its pool's slots over the pool's layers, the remainder to the first.

    Attributes:
        slot_of: int32 [L, E], the slot that an expert holds, -1 for none.
        held: slots that each layer holds.
        quota: each layer's fair share.
        size: slots of each layer's pool.
        members: layers that share each layer's pool, itself included, ascending.
    """

    def __init__(
        self, n_experts: int, pools: Sequence[Pool], pool_slots: Mapping[Pool, int]
    ) -> None:
        n_layers = len(pools)
        self.slot_of = np.full((n_layers, n_experts), -1, dtype=np.int32)
        self.held = [0] * n_layers
        self.quota = [0] * n_layers
        by_pool: dict[Pool, list[int]] = {}
        for layer, pool in enumerate(pools):
            by_pool.setdefault(pool, []).append(layer)
        self.members = [by_pool[pool] for pool in pools]
        self.size = [pool_slots.get(pool, 0) for pool in pools]
        for pool, layers in by_pool.items():
            share, rest = divmod(pool_slots.get(pool, 0), len(layers))
            for i, layer in enumerate(layers):
                self.quota[layer] = share + (i < rest)
        free = {pool: list(range(pool_slots.get(pool, 0) - 1, -1, -1)) for pool in by_pool}
        self._free = [free[pool] for pool in pools]

    def free(self, layer: int) -> int:
        """Return the number of free slots in the layer's pool."""
        return len(self._free[layer])

    def take(self, layer: int) -> int:
        """Charge a free slot to the layer and return it; `assign` must follow."""
        self.held[layer] += 1
        return self._free[layer].pop()

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
        self._free[layer].append(slot)
        return slot

    def check(self) -> None:
        """Assert that every slot is free or held by exactly one expert."""
        for layer, members in enumerate(self.members):
            if members[0] != layer:
                continue
            slots = self.slot_of[members]
            used = np.concatenate([slots[slots >= 0], self._free[layer]])
            assert np.array_equal(np.sort(used), np.arange(self.size[layer])), (layer, used)
            held = [self.held[member] for member in members]
            assert np.array_equal((slots >= 0).sum(axis=1), held), (layer, held)


class VictimQueue:
    """The entries of a table that one plan may evict, least worthy first.

    A layer at its quota gives up its own; otherwise, or if it has none to give, the layer most
    over its quota does (the lower index at a tie). Rows are ranked when first needed.
    """

    def __init__(
        self,
        table: SlotTable,
        values: Callable[[int], npt.NDArray[np.float64]],
        blocked: Callable[[int], npt.NDArray[np.bool_]],
    ) -> None:
        self._table = table
        self._values = values
        self._blocked = blocked
        self._rows: dict[int, list[tuple[float, int]]] = {}

    def peek(self, layer: int) -> tuple[float, ExpertKey] | None:
        """Return the worth and key of what would make room for the layer; None if nothing can."""
        table = self._table
        if table.held[layer] >= table.quota[layer]:
            row = self._row(layer)
            if row:
                return row[-1][0], ExpertKey(layer, row[-1][1])
        by_excess = sorted(table.members[layer], key=lambda m: table.quota[m] - table.held[m])
        for member in by_excess:
            row = self._row(member)
            if row:
                return row[-1][0], ExpertKey(member, row[-1][1])
        return None

    def pop(self, victim: ExpertKey) -> None:
        """Take what `peek` returned off the queue."""
        self._rows[victim.layer].pop()

    def _row(self, layer: int) -> list[tuple[float, int]]:
        row = self._rows.get(layer)
        if row is None:
            present = self._table.slot_of[layer] >= 0
            experts = (present & ~self._blocked(layer)).nonzero()[0]
            values = self._values(layer)[experts]
            falling = values.argsort(kind="stable")[::-1]
            row = list(zip(values[falling].tolist(), experts[falling].tolist(), strict=True))
            self._rows[layer] = row
        return row
