"""Router rows cut down to what a trace keeps of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.routing.router import refuse_broken
from fomoe.traces import _traces
from fomoe.traces.format import MOST_CANDIDATES


@dataclass(frozen=True, slots=True, eq=False)
class RouterRows:
    """The best candidates of router rows, layers first, as the recorder collects them.

    `ids` uint16 [L, T, C] by falling score, then lower id; `probabilities` float32 [L, T, C] their
    softmax over all experts; `tail` float32 [L, T] what all other experts have together.
    """

    ids: npt.NDArray[np.uint16]
    probabilities: npt.NDArray[np.float32]
    tail: npt.NDArray[np.float32]

    @classmethod
    def empty(cls, n_layers: int, n_tokens: int, candidates: int) -> RouterRows:
        """Return room for so many rows; memory that is never written costs nothing."""
        shape = n_layers, n_tokens, candidates
        return cls(np.empty(shape, np.uint16), np.empty(shape, np.float32),
                   np.empty(shape[:2], np.float32))  # fmt: skip

    def part(self, start: int, stop: int) -> RouterRows:
        """Return the rows of some of the tokens; views."""
        part = slice(start, stop)
        return RouterRows(self.ids[:, part], self.probabilities[:, part], self.tail[:, part])


class RowCutter:
    """Cuts rows of router scores into `rows` with one native call and without an allocation."""

    def __init__(self, n_experts: int, rows: RouterRows) -> None:
        self.rows = rows
        self._native = _traces.Reducer(n_experts, rows.ids.shape[2])

    def cut(self, layer: int, scores: npt.NDArray[np.float32]) -> None:
        """Write scores float32 [T, E] of `layer` to its first T rows.

        Raises:
            EngineError: a row holds NaN, +inf or nothing but -inf.
            IndexError: there is no room for T tokens, or no such layer.
        """
        rows = self.rows
        broken = self._native.reduce(scores, layer, rows.ids, rows.probabilities, rows.tail)
        if broken >= 0:
            refuse_broken(broken, len(scores))


def cut_rows(scores: npt.NDArray[np.float32]) -> RouterRows:
    """Return the best candidates of scores float32 [L, T, E].

    Raises:
        EngineError: a row holds NaN, +inf or nothing but -inf.
    """
    scores = np.ascontiguousarray(scores, dtype=np.float32)
    n_layers, n_tokens, n_experts = scores.shape
    candidates = min(MOST_CANDIDATES, n_experts)
    cutter = RowCutter(n_experts, RouterRows.empty(n_layers, n_tokens, candidates))
    for layer in range(n_layers):
        cutter.cut(layer, scores[layer])
    return cutter.rows
