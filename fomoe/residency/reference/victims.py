"""Whose turn it is to give up a slot."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fomoe.residency.slots import SlotTable
from fomoe.types import ExpertKey

FOLLOWED = 2.0**32  # above every worth; a sum is exact to 2^-20


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
        followed: npt.NDArray[np.bool_] | None,
    ) -> None:
        self._table = table
        self._values = values
        self._blocked = blocked
        self._followed = followed
        self._rows: dict[int, list[tuple[float, int]]] = {}

    def peek(self, layer: int) -> tuple[float, ExpertKey] | None:
        """Return the worth and key of what would make room for the layer; None if nothing can."""
        table = self._table
        if table.held[layer] >= table.quota[layer]:
            row = self._row(layer)
            if row:
                return row[-1][0], ExpertKey(layer, row[-1][1])
        by_excess = sorted(table.sharers(layer), key=lambda m: int(table.quota[m] - table.held[m]))
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
            if self._followed is not None:
                values = values + np.where(self._followed[layer, experts], FOLLOWED, 0.0)
            falling = values.argsort(kind="stable")[::-1]
            row = list(zip(values[falling].tolist(), experts[falling].tolist(), strict=True))
            self._rows[layer] = row
        return row
