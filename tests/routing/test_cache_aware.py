"""Cache-aware routing against the rule written as loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.errors import ConfigError
from fomoe.routing import CacheAwareRouting, count_outcomes, route_exact
from fomoe.routing.router import softmax

THRESHOLDS = st.one_of(
    st.sampled_from([0.0, 0.35, 0.5, 1.0, 1.0000001, 1.5, float("inf")]), st.floats(0, 1.2)
)


def slow_route(logits, k, resident, threshold):
    """One token, one rank and one candidate at a time."""
    ids, weights, substituted = [], [], []
    for row, scores, here in zip(logits, softmax(logits), resident, strict=True):
        by_score = sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))
        chosen = by_score[:k]
        denominator = scores[chosen].cumsum()[-1]
        runs, swaps = list(chosen), [False] * k
        for rank, expert in enumerate(chosen):
            if here[expert] or threshold > 1:
                continue
            free = [e for e in by_score if here[e] and e not in runs and e not in chosen]
            if free and scores[free[0]] >= np.float32(threshold) * scores[expert]:
                runs[rank], swaps[rank] = free[0], True
        ids.append(runs)
        weights.append(scores[runs] / denominator)
        substituted.append(swaps)
    return np.array(ids), np.array(weights), np.array(substituted)


@st.composite
def cases(draw):
    n_tokens, n_experts = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.2, 1.0, 4.0, 100.0]))
    logits = rng.normal(0, spread, (n_tokens, n_experts))
    if draw(st.booleans()):
        logits = np.round(logits)
    resident = rng.random((n_tokens, n_experts)) < draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
    return logits.astype(np.float32), draw(st.integers(1, n_experts)), resident


@given(cases(), THRESHOLDS)
def test_twin(case, threshold):
    logits, k, resident = case
    route = CacheAwareRouting(threshold).route(logits, k, resident)
    ids, weights, substituted = slow_route(logits, k, resident, threshold)
    np.testing.assert_array_equal(route.ids, ids)
    np.testing.assert_array_equal(route.weights, weights)
    np.testing.assert_array_equal(route.substituted, substituted)
    assert route.ids.dtype == np.int32
    assert route.weights.dtype == np.float32


@given(cases(), THRESHOLDS)
def test_invariants(case, threshold):
    logits, k, resident = case
    route = CacheAwareRouting(threshold).route(logits, k, resident)
    exact = route_exact(logits, k)
    for token, ids in enumerate(route.ids):
        assert len(set(ids.tolist())) == k
        assert resident[token, ids[route.substituted[token]]].all()
    kept = ~route.substituted
    np.testing.assert_array_equal(route.ids[kept], exact.ids[kept])
    np.testing.assert_array_equal(route.weights[kept], exact.weights[kept])
    assert (route.weights <= exact.weights).all()
    counts = count_outcomes(route, resident)
    assert counts.hits + counts.substituted + counts.misses == route.ids.size
    wanted_here = np.take_along_axis(resident, exact.ids, axis=1)
    assert counts.hits == wanted_here.sum()


@given(cases())
def test_zero_threshold_misses_only_for_want_of_candidates(case):
    logits, k, resident = case
    route = CacheAwareRouting(0.0).route(logits, k, resident)
    exact = route_exact(logits, k)
    for token in range(len(logits)):
        missing = int((~resident[token, exact.ids[token]]).sum())
        spare = int(resident[token].sum()) - (k - missing)
        assert route.substituted[token].sum() == min(missing, spare)


def test_threshold_above_one_never_swaps_even_at_score_zero():
    logits = np.array([[0.0, -300.0, -300.0, -300.0]], dtype=np.float32)
    resident = np.array([True, False, False, True])
    route = CacheAwareRouting(1.5).route(logits, 3, resident)
    assert route.ids.tolist() == [[0, 1, 2]]
    assert count_outcomes(route, resident).misses == 2


def test_a_substitute_keeps_its_score_over_the_original_denominator():
    scores = np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float64)
    logits = np.log(scores).astype(np.float32)[None]
    resident = np.array([True, False, False, True])
    route = CacheAwareRouting(0.3).route(logits, 2, resident)
    assert route.ids.tolist() == [[0, 3]]
    np.testing.assert_allclose(route.weights, [[0.4 / 0.7, 0.1 / 0.7]], rtol=1e-6)
    assert CacheAwareRouting(0.34).route(logits, 2, resident).ids.tolist() == [[0, 1]]


def test_a_heavy_miss_leaves_the_candidate_to_a_lighter_one():
    logits = np.log(np.array([[0.6, 0.2, 0.15, 0.05]])).astype(np.float32)
    resident = np.array([False, False, True, False])
    route = CacheAwareRouting(0.5).route(logits, 2, resident)
    assert route.ids.tolist() == [[0, 2]]
    assert route.substituted.tolist() == [[False, True]]


def test_one_mask_serves_all_tokens():
    logits = np.random.default_rng(3).normal(size=(5, 32)).astype(np.float32)
    mask = np.arange(32) % 3 == 0
    shared = CacheAwareRouting(0.35).route(logits, 4, mask)
    own = CacheAwareRouting(0.35).route(logits, 4, np.tile(mask, (5, 1)))
    np.testing.assert_array_equal(shared.ids, own.ids)
    assert shared.substituted.any()
    assert count_outcomes(shared, mask) == count_outcomes(own, np.tile(mask, (5, 1)))


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_a_threshold_that_is_no_ratio_is_refused(threshold):
    with pytest.raises(ConfigError, match="number >= 0"):
        CacheAwareRouting(threshold)
