"""The relaxed optimum against the best that any cache can do, found by trying everything."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.sim.belady import belady_misses
from fomoe.sim.bounds import filled, knapsack, relaxed, uses_of


@st.composite
def weighted_texts(draw):
    n_experts, k = draw(st.integers(2, 4)), draw(st.integers(1, 2))
    one = st.permutations(range(n_experts)).map(lambda order: order[:k])
    events = draw(st.lists(one, min_size=1, max_size=6))
    shape = len(events), k
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = rng.dirichlet(np.full(k, 0.5), len(events))
    scored = draw(st.lists(st.booleans(), min_size=len(events), max_size=len(events)))
    assert weights.shape == shape
    return np.array(events, np.int32), weights, np.array(scored), draw(st.integers(0, 3)), n_experts


def uses_for(events, weights, scored, capacity, n_experts, size=7):
    missed = belady_misses(events[:, None], scored, capacity, n_experts)[:, 0]
    return uses_of(events, weights, scored, missed, capacity=capacity, expert_bytes=size)


def least_left_out(events, weights, scored, capacity, most_reads, power):
    """Try every choice of reads and of what is held; reads that nothing counts are free."""
    states = {(frozenset(), 0): 0.0}
    for event, w, counts in zip(events, weights, scored, strict=True):
        following = {}
        for (held, reads), lost in states.items():
            missing = sorted(set(event.tolist()) - held)
            for n in range(len(missing) + 1):
                for chosen in combinations(missing, n):
                    used = reads + (n if counts else 0)
                    if used > most_reads:
                        continue
                    there = held | set(chosen)
                    left = sum(v**power for e, v in zip(event, w, strict=True) if e not in there)
                    now = lost + (left if counts else 0.0)
                    for size in range(min(capacity, len(there)) + 1):
                        for kept in combinations(sorted(there), size):
                            state = frozenset(kept), used
                            following[state] = min(now, following.get(state, now))
        states = following
    return min(states.values())


@given(weighted_texts(), st.integers(0, 8), st.sampled_from([1, 2]))
def test_nothing_leaves_out_less_than_the_relaxed_optimum(text, most_reads, power):
    uses = uses_for(*text)
    bound = relaxed([uses], 7.0 * most_reads, power)
    assert bound <= least_left_out(*text[:4], most_reads, power) + 1e-9


def test_the_relaxed_optimum_is_worth_something():
    """With room for nothing it is exact: the heaviest picks are read."""
    rng = np.random.default_rng(0)
    events = rng.random((40, 8)).argsort(axis=1)[:, :3].astype(np.int32)
    weights = rng.dirichlet(np.ones(3), 40)
    uses = uses_for(events, weights, np.ones(40, np.bool_), 0, 8)
    lightest = np.sort(weights.ravel())[: 120 - 30].sum()
    assert relaxed([uses], 7.0 * 30, 1) == pytest.approx(lightest, rel=0.01)
    assert knapsack([uses], 7.0 * 30, 1) == pytest.approx(lightest)


def test_enough_bytes_leave_nothing_out():
    rng = np.random.default_rng(1)
    events = rng.random((40, 8)).argsort(axis=1)[:, :3].astype(np.int32)
    uses = uses_for(events, rng.dirichlet(np.ones(3), 40), np.ones(40, np.bool_), 4, 8)
    reads = 7.0 * uses.missed.sum()
    assert knapsack([uses], reads, 1) == pytest.approx(0, abs=1e-12)
    assert relaxed([uses], reads, 1) == pytest.approx(0, abs=1e-9)
    assert knapsack([uses], reads - 7.0, 1) > 0


def test_without_texts_there_is_nothing_to_leave_out():
    assert relaxed([], 1.0, 1) == knapsack([], 1.0, 1) == 0


@given(st.integers(0, 2**32 - 1))
def test_a_knapsack_by_hand(seed):
    """Whole sizes and room: pieces of size 1, the dearest first."""
    rng = np.random.default_rng(seed)
    values, sizes = rng.random(4), rng.integers(1, 4, 4).astype(np.float64)
    room = float(rng.integers(0, 12))
    pieces = sorted((v / s for v, s in zip(values, sizes, strict=True) for _ in range(int(s))))[
        ::-1
    ]
    assert filled(values, sizes, room) == pytest.approx(np.sort(pieces)[::-1][: int(room)].sum())


def test_lengths_are_tokens_between_uses():
    events = np.array([[0, 1], [1, 2], [3, 0], [0, 2]], np.int32)
    weights = np.arange(8.0).reshape(4, 2)
    scored = np.array([False, True, True, True])
    uses = uses_for(events, weights, scored, 2, 4)
    assert uses.weights.tolist() == [2, 3, 4, 5, 6, 7]
    assert uses.length.tolist() == [1, 0, 0, 2, 1, 2]
    assert uses.room == 2 * 3
