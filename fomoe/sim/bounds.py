"""What leaving experts out must cost: two figures to hold lossy policies against.

Both are about the share of the exact router's picks that does not run, whatever runs instead: the
sum of their weights (`left_out` of `losses.py`) or of their squared weights (`lost_squares`), per
token and layer, where at most so many bytes are read.

**Belady and a knapsack** (`knapsack`): the misses of the offline optimum of exact routing are
given, and the budget is spent on those that weigh most per byte, the last one in part. It says
what is to be had by leaving out the right reads with perfect foresight. It is no bound: an
optimum that knew what is going to be left out would hold other experts (heavy ones), so a policy
could lose less; and hits stay hits although the read that brought them may be left out, so it may
be out of reach.

**The relaxed optimum** (`relaxed`) is a lower bound for every policy, also for offline ones,
whose caches begin empty, hold at most `capacity` experts of each layer between two tokens, read
at most the budget and, at tokens that are not scored, what these want. Between two uses of an
expert, `length` tokens apart, lies an interval; to hold the expert over it makes the second use a
hit. With a price per byte a use is worth max(0, w - price * bytes) read or w as a hit, so the
interval gains min(w, price * bytes). Relaxed are that (1) an interval may begin although the use
before it was left out, and (2) only the sum of the lengths held is limited, to capacity * (tokens
- 1), not each token's. What is left is a fractional knapsack of intervals by gain per length for
each text and layer, and the dual of the budget; any price gives a bound, the best is searched.
(2) is the relaxation PFOO-L of Berger, Beckmann, Harchol-Balter, "Practical bounds on optimal
caching with variable object sizes" (2018).

Neither says anything about what substitutes bring back, and neither knows quality: both bound
sums of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.sim.belady import belady_misses
from fomoe.traces import Trace

Floats = npt.NDArray[np.float64]

_STEPS = 20  # of the search for a price; the last covers a 15,000th of its range


@dataclass(frozen=True, slots=True, eq=False)
class Uses:
    """The picks of one layer of one text that count, with their intervals.

    Attributes:
        weights: float64 [n], of each pick at a scored token.
        length: int64 [n], tokens since the expert's use before; 0 where there is none.
        missed: bool [n], whether the offline optimum of exact routing reads it.
        room: capacity times the gaps between the text's tokens.
        expert_bytes: of the layer.
    """

    weights: Floats
    length: npt.NDArray[np.int64]
    missed: npt.NDArray[np.bool_]
    room: int
    expert_bytes: int


def uses_of(
    ids: npt.NDArray[np.int32], weights: Floats, scored: npt.NDArray[np.bool_],
    missed: npt.NDArray[np.bool_], *, capacity: int, expert_bytes: int,
) -> Uses:  # fmt: skip
    """Return the uses of a layer of a text; ids, weights and missed [T, k], scored [T]."""
    n_tokens, k = ids.shape
    times = np.repeat(np.arange(n_tokens), k)
    flat = ids.ravel()
    order = np.argsort(flat, kind="stable")
    length = np.zeros(flat.size, np.int64)
    same = flat[order[1:]] == flat[order[:-1]]
    length[order[1:][same]] = (times[order[1:]] - times[order[:-1]])[same]
    counts = np.repeat(scored, k)
    return Uses(
        weights.ravel()[counts], length[counts], missed.ravel()[counts],
        capacity * max(n_tokens - 1, 0), expert_bytes,
    )  # fmt: skip


def knapsack(layers: Iterable[Uses], budget_bytes: float, power: int) -> float:
    """Return the sum of weights^power of the optimum's misses that the budget does not read."""
    layers = list(layers)
    values = np.concatenate([np.zeros(0), *(u.weights[u.missed] ** power for u in layers)])
    sizes = np.concatenate(
        [np.zeros(0), *(np.full(int(u.missed.sum()), float(u.expert_bytes)) for u in layers)]
    )
    return float(values.sum()) - filled(values, sizes, budget_bytes)


def filled(values: Floats, sizes: Floats, room: float) -> float:
    """Return the greatest value of a fractional knapsack; sizes are above 0, room from 0."""
    order = np.argsort(-values / sizes, kind="stable")
    total, worth = np.cumsum(sizes[order]), values[order]
    whole = int(np.searchsorted(total, room, side="right"))
    value = float(worth[:whole].sum())
    if whole < len(worth):
        before = total[whole - 1] if whole else 0.0
        value += float(worth[whole] * (room - before) / sizes[order[whole]])
    return value


def relaxed(layers: Iterable[Uses], budget_bytes: float, power: int) -> float:
    """Return a lower bound of the sum of weights^power that is left out at a budget in bytes."""
    layers = list(layers)
    everything = sum(float((u.weights**power).sum()) for u in layers)
    dearest = [float((u.weights**power).max(initial=0.0)) / u.expert_bytes for u in layers]

    def kept(price: float) -> float:
        return price * budget_bytes + sum(_worth(u, price, power) for u in layers)

    # The dual is convex in the price, so that a search by the golden section ends at its least.
    return max(0.0, everything - _least(kept, max(dearest, default=0.0)))


def _least(convex: Callable[[float], float], high: float) -> float:
    """Return about the least value of a convex function from 0 to `high`; it is one it takes."""
    low, shrink = 0.0, (5**0.5 - 1) / 2
    points = [high - shrink * high, shrink * high]
    values = [convex(point) for point in points]
    best = min(convex(low), convex(high), *values)
    for _ in range(_STEPS):
        if values[0] <= values[1]:
            high, points[1], values[1] = points[1], points[0], values[0]
            points[0] = high - shrink * (high - low)
            values[0] = convex(points[0])
        else:
            low, points[0], values[0] = points[0], points[1], values[1]
            points[1] = low + shrink * (high - low)
            values[1] = convex(points[1])
        best = min(best, *values)
    return best


def _worth(uses: Uses, price: float, power: int) -> float:
    """Return what a layer keeps at a price per byte, at most."""
    values, charge = uses.weights**power, price * uses.expert_bytes
    gains = np.minimum(values, charge)
    held = uses.length > 0
    at_once = float(np.maximum(values - charge, 0.0).sum())
    return at_once + filled(gains[held], uses.length[held].astype(np.float64), uses.room)


def text_uses(
    trace: Trace, rows: npt.NDArray[np.int64], scored: npt.NDArray[np.bool_], capacity: int
) -> Iterator[Uses]:
    """Yield the uses of each layer of a text whose tokens are the records `rows`."""
    facts = trace.facts
    k = facts.top_k
    ids = trace.ids[rows, :, :k].astype(np.int32)
    p = trace.probabilities[rows, :, :k].astype(np.float64)
    weights = p / p.sum(axis=2, keepdims=True)
    missed = belady_misses(ids, scored, capacity, facts.n_experts)
    for layer in range(facts.n_layers):
        yield uses_of(
            ids[:, layer], weights[:, layer], scored, missed[:, layer], capacity=capacity,
            expert_bytes=facts.expert_bytes[layer],
        )  # fmt: skip
