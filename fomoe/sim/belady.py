"""The least reads that any cache of exact experts can do: Belady's MIN with bypass.

A token's k experts of a layer are one event: all of them run, and what is not held is read. After
the event any of them and of what was held before may stay, up to the capacity; an expert may be
read, run and not kept (bypass).

Between two uses of an expert that follow each other lies an interval. To hold the expert over it
saves the second read; at most `capacity` intervals may lie over any gap between two events. A
largest such set of intervals is found by going through the events and, where too many overlap,
giving up the one that ends last (M. Carlisle and E. Lloyd, "On the k-coloring of intervals", 1995);
that is Belady's rule (1966), and holds for events of several experts because intervals of one event
compete like any others.

It is a bound for every policy whose caches begin empty, which runs exactly what the router chose
and reads on demand, ahead or in the background; where tokens are not scored, it reads there what
they want. It is none for a policy that leaves experts out or replaces them (`bounds.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fomoe.sim import _sim


def belady_misses(
    ids: npt.NDArray[np.int32], scored: npt.NDArray[np.bool_], capacity: int, n_experts: int
) -> npt.NDArray[np.bool_]:
    """Return which picks an optimal cache must read: bool [T, L, k].

    Args:
        ids: int32 [T, L, k], the experts of one text, distinct in a row.
        scored: bool [T]; reads at other tokens cost nothing and are not returned.
        capacity: experts that each layer holds, from 0; the cache begins empty.
        n_experts: experts of a layer.
    """
    missed = np.empty(ids.shape, np.bool_)
    scored = np.ascontiguousarray(scored)
    for layer in range(ids.shape[1]):
        of_layer = np.empty((len(ids), ids.shape[2]), np.bool_)
        events = np.ascontiguousarray(ids[:, layer], dtype=np.int32)
        _sim.belady(events, scored, capacity, n_experts, of_layer)
        missed[:, layer] = of_layer
    return missed


def reference_misses(
    events: Sequence[Sequence[int]], scored: Sequence[bool], capacity: int
) -> list[list[bool]]:
    """Return the same for one layer, step by step as the rule says it; the oracle in tests."""
    held: dict[int, int] = {}  # expert -> the event that it is kept for
    missed = []
    for time, event in enumerate(events):
        missed.append([scored[time] and held.get(expert) != time for expert in event])
        for expert in event:
            held.pop(expert, None)
            uses = [t for t in range(time + 1, len(events)) if expert in events[t]]
            if uses and scored[uses[0]]:
                held[expert] = uses[0]
        while len(held) > capacity:
            del held[max(held, key=lambda expert: (held[expert], expert))]
    return missed
