"""The routing rules: native against Python to the bit, and what they promise."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.scores import rows_of_scores

from fomoe.errors import ConfigError, EngineError
from fomoe.routing import (
    CacheAwareRouting,
    DropRouting,
    ExactRouting,
    PriceRouting,
    count_outcomes,
    reference,
    route_exact,
)
from fomoe.routing.router import softmax

LAYERS = 3
LIMITS = st.one_of(st.sampled_from([0.0, 0.05, 0.35, 1.0, 2.0, float("inf")]), st.floats(0, 1.2))
KAPPAS = st.sampled_from([0.0, 0.25, 1.0])
SENSITIVITIES = st.one_of(
    st.just(()), st.lists(st.floats(0.25, 4), min_size=LAYERS, max_size=LAYERS).map(tuple)
)
RULES = st.one_of(
    st.just(ExactRouting()),
    st.builds(CacheAwareRouting, LIMITS, st.none() | st.integers(0, 4), st.booleans()),
    st.builds(PriceRouting, LIMITS, st.integers(0, 4), KAPPAS, SENSITIVITIES),
    st.builds(DropRouting, LIMITS, st.integers(0, 4), KAPPAS, SENSITIVITIES),
)


def same_bits(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32))


@given(rows_of_scores(), RULES, st.integers(0, LAYERS - 1))
def test_native_rules_have_the_bits_of_the_reference(case, rule, layer):
    logits, k, resident = case
    got = rule.route(logits, k, resident, layer=layer)
    want = reference.choose(rule, logits, k, resident, layer=layer)
    np.testing.assert_array_equal(got.ids, want.ids)
    same_bits(got.weights, want.weights)
    np.testing.assert_array_equal(got.substituted, want.substituted)


@given(rows_of_scores(), RULES)
def test_a_route_names_distinct_experts_and_substitutes_are_resident(case, rule):
    logits, k, resident = case
    route, exact = rule.route(logits, k, resident), route_exact(logits, k)
    for ids, swapped, wanted, here in zip(
        route.ids, route.substituted, exact.ids, resident, strict=True
    ):
        runs = ids[ids >= 0]
        assert len(set(runs.tolist())) == len(runs)
        assert here[ids[swapped]].all()
        assert not set(ids[swapped].tolist()) & set(wanted.tolist())
        kept_here = set(wanted[here[wanted]].tolist())
        assert kept_here <= set(runs.tolist())
    counts = count_outcomes(route, resident)
    assert counts.hits + counts.substituted + counts.misses + counts.dropped == route.ids.size


@given(rows_of_scores(), KAPPAS)
def test_where_everything_is_resident_every_rule_is_exact(case, kappa):
    logits, k, resident = case
    exact = route_exact(logits, k)
    everything = np.ones_like(resident)
    for rule in (CacheAwareRouting(0), PriceRouting(9, 0, kappa), DropRouting(9, 0, kappa)):
        route = rule.route(logits, k, everything)
        np.testing.assert_array_equal(route.ids, exact.ids)
        same_bits(route.weights, exact.weights)
        assert not route.substituted.any()


@given(rows_of_scores())
def test_a_price_of_nothing_is_exact(case):
    logits, k, resident = case
    route, exact = PriceRouting(0.0).route(logits, k, resident), route_exact(logits, k)
    np.testing.assert_array_equal(route.ids, exact.ids)
    same_bits(route.weights, exact.weights)


SMALL = tuple(range(3, 9))


@given(rows_of_scores(SMALL), st.integers(0, 12))
def test_a_price_maximises_the_mass_of_what_runs_for_its_reads(case, price):
    """P1: no k experts with as few uncached ones have more probability (brute force)."""
    logits, k, resident = case
    route = PriceRouting(price / 16, protected=0, kappa=0.0).route(logits, k, resident)
    for ids, p, here in zip(route.ids, softmax(logits).astype(float), resident, strict=True):
        reads = int((~here[ids]).sum())
        best = max(
            p[list(chosen)].sum()
            for chosen in combinations(range(len(p)), k)
            if (~here[list(chosen)]).sum() <= reads
        )
        # float32 probabilities: a tie within a rounding error may go either way
        assert p[ids].sum() >= best - 1e-6


def greedy_by_mass(p, here, k, budget):
    """P1's greedy: walk by falling p, take the cached ones and the first `budget` others."""
    chosen = []
    for expert in np.argsort(-p, kind="stable"):
        if len(chosen) < k and (here[expert] or budget > 0):
            chosen.append(int(expert))
            budget -= not here[expert]
    return chosen


@given(rows_of_scores(SMALL), st.integers(0, 8))
def test_the_greedy_walk_maximises_mass_under_a_budget_of_reads(case, budget):
    """P1 by brute force over all sets."""
    logits, k, resident = case
    for p, here in zip(softmax(logits).astype(float), resident, strict=True):
        fits = [
            sum(p[list(c)])
            for c in combinations(range(len(p)), k)
            if (~here[list(c)]).sum() <= budget
        ]
        chosen = greedy_by_mass(p, here, k, budget)
        assert bool(fits) == (len(chosen) == k)
        if fits:
            assert p[chosen].sum() == pytest.approx(max(fits), abs=1e-12)


def test_cache_aware_routing_reads_the_wrong_expert():
    """It swaps rank 1 away and then reads a light one: P1's greedy has more mass for one read."""
    p = np.array([0.30, 0.05, 0.28, 0.04], dtype=np.float32)  # the rest: far below
    logits = np.concatenate([np.log(p), np.full(4, -9.0, np.float32)])[None]
    here = np.array([[False, False, True, False] + [True] * 4])
    k = 3
    assert route_exact(logits, k).ids.tolist() == [[0, 2, 1]]
    here[0, 2] = False
    here[0, 3] = True  # the only close candidate, a little below rank 3
    route = CacheAwareRouting(0.1).route(logits, k, here)
    assert route.ids.tolist() == [[3, 2, 1]]  # rank 1 went, ranks 2 and 3 are read
    probabilities = softmax(logits)[0]
    best = greedy_by_mass(probabilities.astype(float), here[0], k, budget=2)
    assert best == [0, 2, 3]
    assert probabilities[best].sum() > probabilities[route.ids[0]].sum() + 0.2


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.lists(st.sampled_from([0.25, 1.0, 4.0]), min_size=8, max_size=8),
    st.integers(0, 8),
)
def test_reading_the_greatest_damages_is_the_best_knapsack(weights, scale, budget):
    """P3: what a threshold on s * w^2 reads is the best set of its size (brute force)."""
    damage = np.array([s * w * w for s, w in zip(scale, weights, strict=False)])
    budget = min(budget, len(damage))
    threshold = np.sort(damage)[::-1][budget - 1] if budget else np.inf
    read = damage >= threshold
    best = min(
        damage.sum() - damage[list(c)].sum()
        for c in combinations(range(len(damage)), int(read.sum()))
    )
    assert damage[~read].sum() == pytest.approx(best)


@given(rows_of_scores(SMALL), st.floats(0.01, 0.6), st.sampled_from([0.25, 1.0, 4.0]))
def test_the_drop_rule_reads_by_that_threshold(case, weight, s):
    logits, k, resident = case
    route = DropRouting(weight, 0, 0.0, (s,)).route(logits, k, resident)
    exact = route_exact(logits, k)
    for rank in range(k):
        for ids, wanted, w, here in zip(route.ids, exact.ids, exact.weights, resident, strict=True):
            reads = s * float(w[rank]) ** 2 - weight**2
            if here[wanted[rank]]:
                assert ids[rank] == wanted[rank]
            elif abs(reads) > 1e-6:
                assert (ids[rank] >= 0) == (reads > 0)


@given(rows_of_scores(), st.integers(0, 4), LIMITS)
def test_protected_ranks_always_run(case, protected, limit):
    logits, k, resident = case
    exact = route_exact(logits, k)
    for rule in (PriceRouting(limit, protected), DropRouting(limit, protected)):
        route = rule.route(logits, k, resident)
        head = exact.ids[:, :protected]
        np.testing.assert_array_equal(route.ids[:, :protected], head)


@given(rows_of_scores(), st.integers(0, 3), LIMITS)
def test_a_budget_bounds_substitutions(case, budget, threshold):
    logits, k, resident = case
    free = CacheAwareRouting(threshold).route(logits, k, resident)
    bounded = CacheAwareRouting(threshold, budget).route(logits, k, resident)
    counts = np.minimum(free.substituted.sum(axis=1), budget)
    np.testing.assert_array_equal(bounded.substituted.sum(axis=1), counts)


@given(rows_of_scores(), st.floats(0.01, 1))
def test_kappa_one_gives_all_lost_mass_back(case, price):
    logits, k, resident = case
    for rule in (PriceRouting(price), CacheAwareRouting(price, None, True)):
        weights = rule.route(logits, k, resident).weights
        # lost mass may all be above 1 - 1e-7 where one expert has nearly everything
        sums = weights.sum(axis=1, dtype=np.float64)
        plain = PriceRouting(price, 2, 0.0).route(logits, k, resident).weights
        heavy = plain.sum(axis=1, dtype=np.float64) > 1e-3
        if isinstance(rule, PriceRouting):
            assert np.allclose(sums[heavy], 1, atol=1e-3)


def test_a_heavy_miss_is_read_and_a_light_one_replaced():
    p = np.array([0.5, 0.2, 0.15, 0.1, 0.05], np.float32)
    here = np.array([False, True, True, False, True])
    route = PriceRouting(0.08, protected=0, kappa=0.0).route(np.log(p)[None], 4, here)
    assert route.ids.tolist() == [[0, 1, 2, 4]]
    np.testing.assert_allclose(route.weights[0], p[[0, 1, 2, 4]] / p[:4].sum(), rtol=1e-5)
    twice = PriceRouting(0.04, 0, 0.0, (1.0, 0.5))
    assert twice.route(np.log(p)[None], 4, here, layer=0).ids.tolist() == [[0, 1, 2, 3]]
    assert twice.route(np.log(p)[None], 4, here, layer=1).ids.tolist() == [[0, 1, 2, 4]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: PriceRouting(-0.1),
        lambda: PriceRouting(float("nan")),
        lambda: PriceRouting(0.1, protected=-1),
        lambda: PriceRouting(0.1, kappa=1.5),
        lambda: PriceRouting(0.1, sensitivities=(1.0, 0.0)),
        lambda: DropRouting(float("nan")),
        lambda: CacheAwareRouting(0.5, budget=-1),
    ],
)
def test_numbers_out_of_range_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_a_layer_without_a_sensitivity_is_an_error():
    with pytest.raises(IndexError, match="layer 2"):
        PriceRouting(0.1, sensitivities=(1.0, 1.0)).route(
            np.zeros((1, 4), np.float32), 2, np.zeros(4, bool), layer=2
        )


def test_scores_that_are_not_finite_are_an_error():
    logits = np.zeros((3, 8), np.float32)
    logits[1, 3] = np.nan
    with pytest.raises(EngineError, match="token 1 of 3"):
        PriceRouting(0.1).route(logits, 2, np.zeros(8, bool))
