"""Cache-aware routing: a resident expert may run in place of a missing one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError
from fomoe.routing.router import Route, best_ids, hide, pick, softmax, sort_keys


@dataclass(frozen=True, slots=True)
class CacheAwareRouting:
    """The dampened ratio rule: swap a missing expert for the best resident one if close enough.

    Walks the missing experts of a token by rank. The best-scoring resident expert that the token
    does not run already takes the place if its softmax score is at least `threshold` times the
    missing one's. It keeps its own score over the original top-k denominator, the others keep
    their weights, and nothing is renormalised. 0 swaps whenever a candidate is left; a threshold
    above 1 never swaps.

    Source: FOMOE, `car_evaluate` with QMOE_CAR_DAMPEN.
    """

    threshold: float

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ConfigError(f"cache-aware threshold {self.threshold}: give a number >= 0")

    def route(
        self, logits: npt.NDArray[np.float32], k: int, resident: npt.NDArray[np.bool_],
        *, layer: int = 0,
    ) -> Route:  # fmt: skip
        """Choose k experts per token, with substitutes for missing ones.

        Args:
            logits: float32 [T, E], router scores.
            k: experts per token, 1 <= k <= E.
            resident: bool [T, E] or [E], the experts that may run without a read.
            layer: not used.

        Returns:
            The route; a substitute stands at the rank of the expert that it replaces.

        Raises:
            ConfigError: k does not fit E.
            EngineError: a row of logits is not finite.
        """
        del layer
        probabilities = softmax(logits)
        keys = sort_keys(logits)
        ids = best_ids(keys, k)
        scores = pick(probabilities, ids)
        denominator = scores.cumsum(axis=1)[:, -1:]  # the exact router's order of summing
        substituted = np.zeros(ids.shape, dtype=np.bool_)
        blocked = np.empty(logits.shape, dtype=np.bool_)
        np.logical_not(resident, out=blocked)
        tokens = np.arange(len(ids))[:, None]
        missing = blocked[tokens, ids]
        if self.threshold <= 1 and missing.any():
            blocked[tokens, ids] = True
            candidates = best_ids(hide(keys, blocked), k)
            offered = pick(probabilities, candidates)
            is_real = ~blocked[tokens, candidates]
            rows, ranks, taken = self._matches(scores, missing, offered, is_real)
            ids[rows, ranks] = candidates[rows, taken]
            scores[rows, ranks] = offered[rows, taken]
            substituted[rows, ranks] = True
        return Route(ids, scores / denominator, substituted)

    def _matches(
        self,
        scores: npt.NDArray[np.float32],
        missing: npt.NDArray[np.bool_],
        offered: npt.NDArray[np.float32],
        is_real: npt.NDArray[np.bool_],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Pair missing ranks with candidates: arrays of row, rank and candidate index.

        Both run in falling score, so the sequential walk has a closed form. Candidate j is good
        enough from missing expert need_j on, and goes to the first such one after candidate
        j - 1's: place_j = max(need_j, place_(j-1) + 1) = j + max over i <= j of (need_i - i).
        """
        n_tokens, k = scores.shape
        by_rank = (~missing).argsort(axis=1, kind="stable")
        bars = np.float32(self.threshold) * scores[np.arange(n_tokens)[:, None], by_rank]
        steps = np.arange(k)
        n_missing = missing.sum(axis=1, keepdims=True)
        is_short = offered[:, :, None] < bars[:, None, :]
        is_short &= (steps < n_missing)[:, None, :]
        need = is_short.sum(axis=2)
        place = np.maximum.accumulate(need - steps, axis=1) + steps
        rows, taken = ((place < n_missing) & is_real).nonzero()
        return rows, by_rank[rows, place[rows, taken]], taken


@dataclass(frozen=True, slots=True)
class RouteCounts:
    """Activations of a route by outcome: hits + substituted + misses = T * k."""

    hits: int
    substituted: int
    misses: int


def count_outcomes(route: Route, resident: npt.NDArray[np.bool_]) -> RouteCounts:
    """Count a route's outcomes under the mask that it was made with (bool [T, E] or [E])."""
    mask = np.broadcast_to(resident, (len(route.ids), resident.shape[-1]))
    present = np.take_along_axis(mask, route.ids, axis=1)
    substituted = int(route.substituted.sum())
    hits = int((present & ~route.substituted).sum())
    return RouteCounts(hits, substituted, route.ids.size - hits - substituted)
