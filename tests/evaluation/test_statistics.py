from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.errors import ConfigError
from fomoe.evaluation.statistics import (
    cluster_sums,
    estimate_mean,
    estimate_ratio,
    interval,
    ratio_draws,
    resampled_means,
    upper_bound,
    worst_mean,
    worst_of,
    worst_ratio,
)


def ragged(rng: np.random.Generator, sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    documents = np.repeat(np.arange(len(sizes)), sizes)
    values = rng.standard_normal(len(sizes))[documents] + rng.standard_normal(len(documents))
    return values, documents


@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.integers(0, 99))
def test_means_and_errors_agree_with_their_sums_written_out(sizes: list[int], seed: int) -> None:
    values, documents = ragged(np.random.default_rng(seed), sizes)
    shuffled = np.random.default_rng(seed + 1).permutation(len(values))
    sums = cluster_sums(values[shuffled], documents[shuffled])
    mean = math.fsum(values) / len(values)
    squares = 0.0
    for document in range(len(sizes)):
        squares += (
            sum(v - mean for v, d in zip(values, documents, strict=True) if d == document) ** 2
        )
    error = math.sqrt(len(sizes) / (len(sizes) - 1) * squares) / len(values)
    assert sums.means[0] == pytest.approx(mean, rel=1e-9, abs=1e-12)
    assert sums.standard_errors()[0] == pytest.approx(error, rel=1e-9, abs=1e-12)
    assert sums.tokens == sum(sizes)


def test_documents_of_one_size_give_the_textbook_error_of_their_means() -> None:
    rng = np.random.default_rng(5)
    table = rng.standard_normal((20, 7))
    sums = cluster_sums(table.ravel(), np.repeat(np.arange(20), 7))
    textbook = table.mean(axis=1).std(ddof=1) / math.sqrt(20)
    assert sums.standard_errors()[0] == pytest.approx(textbook, rel=1e-12)


def test_draws_have_the_distribution_of_all_draws() -> None:
    sizes, totals = np.array([1, 2, 4]), np.array([5.0, -2.0, 8.0])
    documents = np.repeat([0, 1, 2], sizes)
    sums = cluster_sums((totals / sizes)[documents], documents)
    every = [
        totals[list(draw)].sum() / sizes[list(draw)].sum()
        for draw in itertools.product(range(3), repeat=3)
    ]
    draws = resampled_means(sums, seed=1, resamples=40_000)[:, 0]
    assert set(np.round(draws, 9)) == set(np.round(every, 9))
    # 40,000 draws: four standard deviations of a share are at most 0.01.
    for value in set(np.round(every, 9)):
        share = np.mean(np.round(every, 9) == value)
        assert np.mean(np.round(draws, 9) == value) == pytest.approx(share, abs=0.01)


def test_draws_are_paired_and_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values, documents = ragged(np.random.default_rng(2), [3, 5, 2, 8, 1])
    both = cluster_sums(np.column_stack([values, 2 * values + 1]), documents)
    draws = resampled_means(both, seed=4, resamples=500)
    np.testing.assert_allclose(draws[:, 1], 2 * draws[:, 0] + 1, rtol=1e-12)
    assert not np.array_equal(draws, resampled_means(both, seed=5, resamples=500))
    monkeypatch.setattr("fomoe.evaluation.statistics._DRAWS", 7)
    # Sums of five documents in float64: a product's order of summing may change with its shape.
    np.testing.assert_allclose(draws, resampled_means(both, seed=4, resamples=500), rtol=1e-12)


def test_the_bootstrap_agrees_with_the_robust_error_over_many_documents() -> None:
    rng = np.random.default_rng(8)
    values, documents = ragged(rng, list(rng.integers(1, 40, 3000)))
    estimate = estimate_mean(values, documents, seed=3)
    # The interval's ends are quantiles of 4,000 draws: good to about 5 % of the width.
    assert estimate.high - estimate.mean == pytest.approx(1.96 * estimate.standard_error, rel=0.1)
    assert estimate.mean - estimate.low == pytest.approx(1.96 * estimate.standard_error, rel=0.1)
    assert (estimate.documents, estimate.tokens) == (3000, len(values))


def test_intervals_cover_as_often_as_they_say_and_token_errors_would_not() -> None:
    rng = np.random.default_rng(9)
    covered = naive = 0
    for trial in range(300):
        values, documents = ragged(rng, [10] * 60)
        estimate = estimate_mean(values, documents, seed=trial, resamples=400)
        covered += estimate.low <= 0 <= estimate.high
        naive += abs(values.mean()) <= 1.96 * values.std() / math.sqrt(len(values))
    # 0.95 of 300 with a standard deviation of 0.0126; 60 documents lose a point.
    assert 0.90 <= covered / 300 <= 0.985
    assert naive / 300 < 0.75


def test_quantiles_are_draws_and_take_infinities() -> None:
    draws = np.concatenate([np.arange(95.0), np.full(5, np.inf)])
    assert upper_bound(draws, 0.9) == 90.0
    assert upper_bound(draws, 0.95) == math.inf
    assert interval(np.arange(1001.0), 0.95) == (25.0, 975.0)


def test_a_ratio_has_fiellers_interval() -> None:
    rng = np.random.default_rng(11)
    n, sizes = 2000, 20
    documents = np.repeat(np.arange(n), sizes)
    common = rng.standard_normal(n)[documents]
    baseline = 0.2 + 0.5 * common + rng.standard_normal(n * sizes)
    ours = 0.06 + 0.2 * common + rng.standard_normal(n * sizes)
    ratio = estimate_ratio(ours, baseline, documents, seed=1)
    a, b = (x.reshape(n, sizes).mean(axis=1) for x in (ours, baseline))
    cov = np.cov(a, b) / n
    # Fieller: the theta where (mean a - theta mean b)^2 = z^2 var(a - theta b).
    z = 1.959964
    p = b.mean() ** 2 - z**2 * cov[1, 1]
    q = a.mean() * b.mean() - z**2 * cov[0, 1]
    r = a.mean() ** 2 - z**2 * cov[0, 0]
    root = math.sqrt(q * q - p * r)
    low, high = (q - root) / p, (q + root) / p
    assert ratio.value == pytest.approx(a.mean() / b.mean(), rel=1e-12)
    assert ratio.low == pytest.approx(low, abs=0.1 * (high - low))
    assert ratio.high == pytest.approx(high, abs=0.1 * (high - low))
    assert ratio.value < ratio.upper < ratio.high
    assert ratio.is_judged
    assert ratio.sigmas == pytest.approx(b.mean() / math.sqrt(cov[1, 1]), rel=1e-9)


def test_a_baseline_without_excess_gives_no_good_ratio() -> None:
    assert list(ratio_draws(np.array([[1.0, 2.0], [1.0, 0.0], [-1.0, -2.0]]))) == [
        0.5,
        math.inf,
        math.inf,
    ]
    rng = np.random.default_rng(1)
    documents = np.repeat(np.arange(50), 4)
    ratio = estimate_ratio(rng.standard_normal(200), rng.standard_normal(200), documents)
    assert ratio.upper == math.inf
    assert not ratio.is_judged
    for baseline, sigmas in ((0.0, 0.0), (0.5, math.inf), (-0.5, -math.inf)):
        same = estimate_ratio(np.ones(200), np.full(200, baseline), documents)
        assert same.sigmas == sigmas
        assert same.is_judged == (baseline > 0)


def test_twice_the_same_excess_has_ratio_one_without_spread() -> None:
    values, documents = ragged(np.random.default_rng(3), [4, 4, 9, 2])
    ratio = estimate_ratio(abs(values), abs(values), documents)
    assert (ratio.value, ratio.low, ratio.high, ratio.upper) == (1.0, 1.0, 1.0, 1.0)


def test_the_worst_domain_and_the_bound_of_the_maximum() -> None:
    draws = {"a": np.array([1.0, 5.0, 2.0, 0.0]), "b": np.array([3.0, 0.0, 4.0, 1.0])}
    worst = worst_of({"a": 2.0, "b": 2.5}, draws, level=0.5)
    assert (worst.domain, worst.value) == ("b", 2.5)
    # The maxima are 3, 5, 4, 1; half of them are at most 3, the quantile goes up to the next draw.
    assert worst.upper == upper_bound(np.array([3.0, 5.0, 4.0, 1.0]), 0.5) == 4.0
    assert worst.uppers == {"a": 2.0, "b": 3.0}
    with pytest.raises(ConfigError, match="differ"):
        worst_of({"a": 1.0}, draws)
    with pytest.raises(ConfigError, match="same number"):
        worst_of({"a": 1.0, "b": 1.0}, draws | {"b": np.zeros(3)})


def test_domains_are_resampled_apart() -> None:
    values, documents = ragged(np.random.default_rng(6), [5] * 200)
    sums = cluster_sums(values, documents)
    alone = worst_mean({"a": sums}, seed=2)
    three = worst_mean({"a": sums, "b": sums, "c": sums}, seed=2)
    # With one seed for all the maximum would have no more spread than one domain.
    assert three.upper > alone.upper
    assert three.uppers["a"] == alone.uppers["a"] != three.uppers["b"]


def test_the_worst_ratio_is_the_greatest() -> None:
    rng = np.random.default_rng(7)
    documents = np.repeat(np.arange(300), 10)
    noise = rng.standard_normal((2, 3000)) * 0.1
    domains = {
        name: cluster_sums(np.column_stack([share + noise[0], 1 + noise[1]]), documents)
        for name, share in (("wiki", 0.2), ("code", 0.5), ("chat", 0.3))
    }
    worst = worst_ratio(domains, seed=1)
    assert worst.domain == "code"
    assert 0.5 < worst.upper < 0.52
    assert worst.uppers["wiki"] < 0.22


@pytest.mark.parametrize(
    ("values", "documents", "message"),
    [
        ([1.0, 2.0], [0], "do not belong together"),
        ([1.0, math.nan, 2.0], [0, 1, 1], "1 of 3 tokens"),
        ([1.0, 2.0], [0, 0], "1 document"),
        ([], [], "0 document"),
    ],
)
def test_what_has_no_spread_is_refused(
    values: list[float], documents: list[int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        cluster_sums(values, documents)
