"""Tokens grouped by expert: the shape in which kernels want a route."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.routing import _routing


@dataclass(frozen=True, slots=True, eq=False)
class ExpertGroups:
    """The (expert, token) pairs of a route, sorted by expert id, then token.

    Expert `experts[i]` serves tokens `pair_token[pair_start[i]:pair_start[i + 1]]`.
    `order[t]` lists token t's pairs in ascending expert id, the order of the routed sum;
    `ranks[t]` the router's ranks in that order. All int32: experts [n], pair_start [n + 1],
    pair_token [P], order and ranks [T, k].
    """

    experts: npt.NDArray[np.int32]
    pair_start: npt.NDArray[np.int32]
    pair_token: npt.NDArray[np.int32]
    order: npt.NDArray[np.int32]
    ranks: npt.NDArray[np.int32]

    def arrange(self, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Permute a route's weights, float32 [T, k], from rank order into that of `order`."""
        return np.take_along_axis(weights, self.ranks, axis=1)


def group_by_expert(ids: npt.NDArray[np.int32]) -> ExpertGroups:
    """Group a route's pairs by expert.

    Args:
        ids: int32 [T, k], expert ids >= 0; a token names an expert at most once.

    Returns:
        The groups, experts ascending; with T = 0 they are empty.
    """
    pairs = ids.size
    experts, pair_token = np.empty((2, pairs), dtype=np.int32)
    pair_start = np.empty(pairs + 1, dtype=np.int32)
    order, ranks = np.empty((2, *ids.shape), dtype=np.int32)
    ids = np.ascontiguousarray(ids)
    n = _routing.group(ids, experts, pair_start, pair_token, order, ranks)
    return ExpertGroups(experts[:n], pair_start[: n + 1], pair_token, order, ranks)
