from __future__ import annotations

import math

import numpy as np
import pytest

from fomoe.errors import ConfigError
from fomoe.evaluation.divergence import (
    compare,
    kl_divergence,
    negative_log_likelihoods,
)
from fomoe.evaluation.segments import SEGMENTS


def logits(seed: int, rows: int = 70, vocab: int = 50) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * 8).astype(np.float32)


def test_scores_agree_with_their_definitions() -> None:
    p, q = logits(1), logits(2)
    targets = np.random.default_rng(3).integers(0, 50, 70)
    scores = compare(p, q, targets)
    for row in range(70):
        a = [math.exp(float(x)) for x in p[row]]
        b = [math.exp(float(x)) for x in q[row]]
        za, zb = math.fsum(a), math.fsum(b)
        kl = math.fsum(x / za * math.log((x / za) / (y / zb)) for x, y in zip(a, b, strict=True))
        assert scores.kl[row] == pytest.approx(kl, rel=1e-9)
        assert scores.exact_nll[row] == pytest.approx(-math.log(a[targets[row]] / za), rel=1e-9)
        assert scores.policy_nll[row] == pytest.approx(-math.log(b[targets[row]] / zb), rel=1e-9)
        assert scores.agrees[row] == (np.argmax(a) == np.argmax(b))
    np.testing.assert_array_equal(scores.excess, scores.policy_nll - scores.exact_nll)


def test_a_gaussian_has_its_closed_form() -> None:
    x = np.linspace(-30, 30, 20_001)
    p = -(x**2) / 2
    q = -((x - 1.5) ** 2) / (2 * 4)
    expected = math.log(2) + (1 + 1.5**2) / 8 - 0.5
    assert kl_divergence(p[None], q[None])[0] == pytest.approx(expected, rel=1e-6)


def test_shifts_and_equal_rows_cost_nothing() -> None:
    p = logits(4).astype(np.float64)
    assert kl_divergence(p, p + 1e3).max() < 1e-12
    assert (kl_divergence(p, p) == 0.0).all()


def test_small_differences_keep_their_digits() -> None:
    p = logits(5, rows=1).astype(np.float64)
    direction = np.random.default_rng(6).standard_normal(p.shape)
    w = np.exp(p - p.max())
    w /= w.sum()
    variance = float((w * direction**2).sum() - (w * direction).sum() ** 2)
    # KL to second order is half the variance of the change under p.
    assert kl_divergence(p, p + 1e-5 * direction)[0] == pytest.approx(
        variance / 2 * 1e-10, rel=1e-3
    )


def test_of_equal_logits_the_lower_id_is_the_likelier() -> None:
    p = np.array([[1.0, 3.0, 3.0], [0.0, 1.0, 2.0]], np.float32)
    q = np.array([[1.0, 3.0, 4.0], [0.0, 1.0, 2.0]], np.float32)
    assert compare(p, q, np.zeros(2, np.int64)).agrees.tolist() == [False, True]


def test_what_does_not_fit_is_refused() -> None:
    p = logits(7, rows=3)
    with pytest.raises(ConfigError, match="do not fit"):
        compare(p, p[:2], np.zeros(3, np.int64))
    broken = p.copy()
    broken[1, 4] = np.inf
    with pytest.raises(ConfigError, match="not finite"):
        compare(p, broken, np.zeros(3, np.int64))


def test_segments_cover_each_step_once() -> None:
    steps = np.arange(2000)
    masks = np.stack([segment.mask(steps) for segment in SEGMENTS])
    assert (masks.sum(axis=0) == 1).all()
    assert [int(np.flatnonzero(mask)[0]) for mask in masks] == [0, 100, 512]


def test_the_likelihood_agrees_with_its_definition() -> None:
    rng = np.random.default_rng(3)
    rows = (rng.standard_normal((150, 40)) * 30).astype(np.float32)
    targets = rng.integers(0, 40, 150)
    slow = 0.0
    for row, target in zip(rows.astype(np.longdouble), targets, strict=True):
        slow -= float(np.log(np.exp(row - row.max())[target] / np.exp(row - row.max()).sum()))
    assert negative_log_likelihoods(rows, targets).sum() == pytest.approx(slow, rel=1e-12)


def test_huge_logits_stay_finite() -> None:
    rows = np.array([[1e30, 0.0], [-1e30, 0.0]], np.float32)
    assert negative_log_likelihoods(rows, np.array([0, 1])).sum() == 0.0
