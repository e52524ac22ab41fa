"""The offline optimum against its step-by-step rule, and that against all that caches can do."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.sim.belady import belady_misses, reference_misses


@st.composite
def histories(draw, most_tokens, most_experts):
    n_experts = draw(st.integers(1, most_experts))
    k = draw(st.integers(1, min(3, n_experts)))
    one = st.permutations(range(n_experts)).map(lambda order: order[:k])
    events = draw(st.lists(one, min_size=1, max_size=most_tokens))
    scored = draw(st.lists(st.booleans(), min_size=len(events), max_size=len(events)))
    return n_experts, events, scored, draw(st.integers(0, n_experts))


def native(events, scored, capacity, n_experts):
    ids = np.array(events, np.int32)[:, None]
    return belady_misses(ids, np.array(scored), capacity, n_experts)[:, 0]


@given(histories(40, 12))
def test_native_follows_the_rule(history):
    n_experts, events, scored, capacity = history
    want = reference_misses(events, scored, capacity)
    assert native(events, scored, capacity, n_experts).tolist() == want


def least_reads(events, scored, capacity):
    """Try every set that may be held after every event."""
    states = {frozenset(): 0}
    for event, counts in zip(events, scored, strict=True):
        following = {}
        for held, reads in states.items():
            now = reads + (len(set(event) - held) if counts else 0)
            there = held | set(event)
            for size in range(min(capacity, len(there)) + 1):
                for kept in combinations(sorted(there), size):
                    state = frozenset(kept)
                    following[state] = min(now, following.get(state, now))
        states = following
    return min(states.values())


@given(histories(7, 5))
def test_no_cache_reads_less(history):
    n_experts, events, scored, capacity = history
    assert native(events, scored, capacity, n_experts).sum() == least_reads(
        events, scored, capacity
    )


def test_layers_are_caches_of_their_own():
    rng = np.random.default_rng(0)
    ids = rng.random((30, 3, 9)).argsort(axis=2)[:, :, :2].astype(np.int32)
    scored = np.ones(30, np.bool_)
    whole = belady_misses(ids, scored, 4, 9)
    for layer in range(3):
        alone = belady_misses(ids[:, layer : layer + 1], scored, 4, 9)
        np.testing.assert_array_equal(whole[:, layer], alone[:, 0])


@pytest.mark.parametrize("expert", [-1, 9])
def test_ids_that_are_no_experts_are_refused(expert):
    ids = np.full((1, 1, 1), expert, np.int32)
    with pytest.raises(IndexError, match=f"no expert {expert}"):
        belady_misses(ids, np.ones(1, np.bool_), 1, 9)
