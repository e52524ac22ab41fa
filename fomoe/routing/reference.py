"""The native routing module in NumPy: the definition of its bits, and its oracle in tests."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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
