"""The native routing module in NumPy: the definition of its bits, and its oracle in tests."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.routing.router import Route
from fomoe.routing.rules import CacheAwareRouting, DropRouting, PriceRouting, RoutingRule

_LANES = 16
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to a whole number
_LEAST = np.float32(-87.0)
_SERIES = [np.float32(1) / np.float32(n) for n in (5040, 720, 120, 24, 6, 2, 1, 1)]


def exp_negative(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return e^x for x <= 0 in float32, to about an ulp; 0 below -87.

    x = n ln 2 + r with |r| <= ln 2 / 2, e^r by Taylor's series; no fused step.
    """
    clamped = np.where(x > _LEAST, x, _LEAST)
    shifted = clamped * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = (clamped - n * _LN2_HIGH) - n * _LN2_LOW
    y = np.full_like(r, _SERIES[0])
    for term in _SERIES[1:]:
        y = y * r + term
    power = shifted.view(np.int32) - _ROUND.view(np.int32) + np.int32(127)
    scale = (power << 23).astype(np.int32).view(np.float32)
    return np.where(x >= _LEAST, y * scale, np.float32(0))


def row_sums(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the sums [T] of rows [T, E]: value i goes to lane i mod 16, lanes add as a tree."""
    lanes = np.zeros((len(values), _LANES), np.float32)
    for start in range(0, values.shape[1], _LANES):
        part = values[:, start : start + _LANES]
        lanes[:, : part.shape[1]] += part
    half = _LANES // 2
    while half:
        lanes[:, :half] += lanes[:, half : 2 * half]
        half //= 2
    sums: npt.NDArray[np.float32] = lanes[:, 0]
    return sums


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Softmax over the last axis of [T, E]; the greatest of each row must be finite."""
    powers = exp_negative(logits - logits.max(axis=1, keepdims=True))
    probabilities: npt.NDArray[np.float32] = powers / row_sums(powers)[:, None]
    return probabilities


def route(
    logits: npt.NDArray[np.float32], k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return ids and weights [T, k]; the chosen probabilities are summed by falling rank."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k].astype(np.int32)
    chosen = np.take_along_axis(softmax(logits), ids, axis=1)
    sums = np.zeros(len(logits), np.float32)
    for rank in range(k):
        sums += chosen[:, rank]
    return ids, chosen / sums[:, None]


def predict(
    logits: npt.NDArray[np.float32], k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return the union of the rows' k best and its margins, greatest first, then lower id."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, : k + 1].astype(np.int32)
    p = np.take_along_axis(softmax(logits), best, axis=1)
    sums = np.zeros(len(logits), np.float32)
    for rank in range(k):
        sums += p[:, rank]
    following = p[:, k] if p.shape[1] > k else np.zeros(len(logits), np.float32)
    by_expert = np.zeros(logits.shape[1], np.float32)
    np.maximum.at(by_expert, best[:, :k], (p[:, :k] - following[:, None]) / sums[:, None])
    chosen = np.unique(best[:, :k])
    ranked: npt.NDArray[np.int32] = chosen[np.argsort(-by_expert[chosen], kind="stable")]
    return ranked, by_expert[ranked]


def choose(
    rule: RoutingRule, logits: npt.NDArray[np.float32], k: int, resident: npt.NDArray[np.bool_],
    *, layer: int = 0,
) -> Route:  # fmt: skip
    """Route rows [T, E] by a rule, one token and one expert at a time; resident [T, E]."""
    rows = [
        _choose_row(rule, row, p, k, here, layer)
        for row, p, here in zip(logits, softmax(logits), resident, strict=True)
    ]
    ids, weights, substituted = zip(*rows, strict=True)
    return Route(
        np.array(ids, np.int32).reshape(-1, k),
        np.array(weights, np.float32).reshape(-1, k),
        np.array(substituted, np.bool_).reshape(-1, k),
    )


_Row = tuple[list[int], list[np.float32], list[bool]]


def _choose_row(
    rule: RoutingRule, logits: npt.NDArray[np.float32], p: npt.NDArray[np.float32], k: int,
    resident: npt.NDArray[np.bool_], layer: int,
) -> _Row:  # fmt: skip
    order = np.argsort(-logits, kind="stable").tolist()
    return choose_ranked(rule, order, p[order], k, resident, layer=layer)


def choose_ranked(
    rule: RoutingRule, order: list[int], p: npt.NDArray[np.float32], k: int,
    resident: npt.NDArray[np.bool_], *, layer: int = 0,
) -> _Row:  # fmt: skip
    """Route one token whose experts `order`, best first, have the probabilities `p`."""
    total = np.float32(0)
    for rank in range(k):
        total += p[rank]
    weight = dict(zip(order, p / total, strict=True))
    score = dict(zip(order, p, strict=True))
    top, rest = order[:k], [e for e in order[k:] if resident[e]]
    if isinstance(rule, CacheAwareRouting):
        ids = _swap_by_ratio(rule, top, rest, score, resident)
    elif isinstance(rule, PriceRouting):
        ids = _swap_by_price(rule, top, rest, weight, resident, layer)
    elif isinstance(rule, DropRouting):
        ids = _drop(rule, top, weight, resident, layer)
    else:
        ids = top
    weights = [weight[e] if e >= 0 else np.float32(0) for e in ids]
    kappa = (
        np.float32(rule.renormalise)
        if isinstance(rule, CacheAwareRouting)
        else (np.float32(getattr(rule, "kappa", 0)))
    )
    if ids != top:
        weights = _give_back(weights, kappa)
    return ids, weights, [e >= 0 and e not in top for e in ids]


def _swap_by_ratio(
    rule: CacheAwareRouting, top: list[int], rest: list[int], score: dict[int, np.float32],
    resident: npt.NDArray[np.bool_],
) -> list[int]:  # fmt: skip
    ids, left = list(top), list(rest)
    budget = len(top) if rule.budget is None else rule.budget
    for rank, expert in enumerate(top):
        if resident[expert] or np.float32(rule.threshold) > 1 or not left or not budget:
            continue
        if score[left[0]] >= np.float32(rule.threshold) * score[expert]:
            ids[rank] = left.pop(0)
            budget -= 1
    return ids


def _swap_by_price(
    rule: PriceRouting, top: list[int], rest: list[int], weight: dict[int, np.float32],
    resident: npt.NDArray[np.bool_], layer: int,
) -> list[int]:  # fmt: skip
    """Sort all experts that may run by their value; stable, so the router's order breaks ties."""
    s = np.float32(rule.sensitivities[layer]) if rule.sensitivities else np.float32(1)
    price = np.float32(rule.price) / s
    value = {e: weight[e] - (np.float32(0) if resident[e] else price) for e in top + rest}
    guarded = top[: rule.protected]
    others = sorted(top[rule.protected :] + rest, key=lambda e: -value[e])
    runs = set(guarded + others[: len(top) - len(guarded)])
    return [e for e in top + rest if e in runs]


def _drop(
    rule: DropRouting, top: list[int], weight: dict[int, np.float32],
    resident: npt.NDArray[np.bool_], layer: int,
) -> list[int]:  # fmt: skip
    least = np.float32(rule.weight)
    if rule.sensitivities:
        least = least / np.sqrt(np.float32(rule.sensitivities[layer]))
    return [
        e if rank < rule.protected or resident[e] or weight[e] >= least else -1
        for rank, e in enumerate(top)
    ]


def _give_back(weights: list[np.float32], kappa: np.float32) -> list[np.float32]:
    """Multiply the weights so that `kappa` of the lost mass comes back."""
    total = np.float32(0)
    for w in weights:
        total += w
    lost = max(np.float32(1) - total, np.float32(0))
    if not kappa > 0 or not total > 0:
        return weights
    factor = np.float32(1) + kappa * lost / total
    return [w * factor for w in weights]
