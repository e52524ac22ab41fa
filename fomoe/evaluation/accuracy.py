"""Paired accuracy: McNemar's exact test."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError


@dataclass(frozen=True, slots=True)
class McNemar:
    """Accuracy of two ways of answering the same questions.

    Attributes:
        questions: Questions answered by both.
        exact: Share that exact mode got right.
        policy: Share that the policy got right.
        lost: Questions that only exact mode got right.
        won: Questions that only the policy got right.
        difference: policy - exact.
        standard_error: Of the difference, from the discordant pairs.
        p_value: Two-sided exact binomial test of lost against won at one half.
    """

    questions: int
    exact: float
    policy: float
    lost: int
    won: int
    difference: float
    standard_error: float
    p_value: float


def mcnemar(exact: npt.ArrayLike, policy: npt.ArrayLike) -> McNemar:
    """Compare two rows of right or wrong answers, bool [N] each, question by question.

    Raises:
        ConfigError: the rows differ in length or are empty.
    """
    a, b = np.asarray(exact, np.bool_), np.asarray(policy, np.bool_)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ConfigError(f"answers {a.shape} and {b.shape} do not belong to the same questions")
    lost, won = int((a & ~b).sum()), int((b & ~a).sum())
    difference = (won - lost) / a.size
    variance = ((won + lost) / a.size - difference**2) / a.size
    return McNemar(
        questions=a.size,
        exact=float(a.mean()),
        policy=float(b.mean()),
        lost=lost,
        won=won,
        difference=difference,
        standard_error=math.sqrt(max(variance, 0.0)),
        p_value=binomial_p(lost, won),
    )


def binomial_p(lost: int, won: int) -> float:
    """Return the two-sided p of a fair coin for these counts, exact to the last digit."""
    n = lost + won
    term, total = 1, 0
    for i in range(min(lost, won) + 1):
        total += term
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * total / (1 << n))
