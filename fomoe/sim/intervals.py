"""How sure a figure is that was measured on some texts: paired over texts, resampled by text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_RESAMPLES = 2000
_LEAST_TEXTS = 5  # fewer say nothing about other texts

Floats = npt.NDArray[np.float64]


def ratio_interval(
    numerator: Floats, denominator: Floats, share: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Return a percentile bootstrap interval of sum(numerator) / sum(denominator).

    Args:
        numerator: float64 [texts]; pairs with
        denominator: float64 [texts].
        share: how much of the resampled ratios lies inside.
        seed: of the resampling.

    Returns:
        None with fewer than 5 texts, or where a resampled denominator is 0.
    """
    count = len(numerator)
    if count < _LEAST_TEXTS:
        return None
    drawn = np.random.default_rng(seed).integers(0, count, (_RESAMPLES, count))
    below = denominator[drawn].sum(axis=1)
    if not below.all():
        return None
    ratios = numerator[drawn].sum(axis=1) / below
    low, high = np.quantile(ratios, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
