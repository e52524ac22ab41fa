"""The logical cache against a list in order of use, and what it must not depend on."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.engine.decisions import Decider
from fomoe.errors import ConfigError
from fomoe.residency import LogicalCaches, LogicalRules
from fomoe.residency.logical import LogicalCache as _LogicalCache
from fomoe.routing import DropRouting, ExactRouting

N_LAYERS, N_EXPERTS, K = 2, 10, 3


def LogicalCache(n_layers, n_experts, capacity):  # noqa: N802
    return _LogicalCache(n_layers, n_experts, LogicalRules(capacity=capacity, eviction="lru"))


@st.composite
def token_histories(draw):
    """Ids [T, layers, k], each token's in random rank order."""
    n_tokens = draw(st.integers(0, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    order = rng.random((n_tokens, N_LAYERS, N_EXPERTS)).argsort(axis=2)
    return order[:, :, :K].astype(np.int32)


@given(token_histories(), st.integers(K, N_EXPERTS))
def test_each_token_is_one_event_of_an_lru(history, capacity):
    cache = LogicalCache(N_LAYERS, N_EXPERTS, capacity)
    stacks = [[] for _ in range(N_LAYERS)]
    for token in history:
        for layer, ids in enumerate(token):
            cache.commit(layer, ids[None])
            rest = [e for e in stacks[layer] if e not in ids]
            stacks[layer] = (sorted(ids.tolist(), reverse=True) + rest)[:capacity]
            assert np.flatnonzero(cache.mask(layer)).tolist() == sorted(stacks[layer])


@given(token_histories(), st.integers(K, N_EXPERTS), st.lists(st.integers(0, 12)))
def test_chunks_and_the_order_of_layers_do_not_matter(history, capacity, cuts):
    by_token = LogicalCache(N_LAYERS, N_EXPERTS, capacity)
    for token in history:
        for layer, ids in enumerate(token):
            by_token.commit(layer, np.sort(ids)[None])
    by_layer = LogicalCache(N_LAYERS, N_EXPERTS, capacity)
    for layer in reversed(range(N_LAYERS)):
        for chunk in np.split(history[:, layer], sorted(min(c, len(history)) for c in cuts)):
            by_layer.commit(layer, chunk)
    assert by_token.hash == by_layer.hash
    for layer in range(N_LAYERS):
        np.testing.assert_array_equal(by_token.mask(layer), by_layer.mask(layer))


@given(token_histories().filter(len), st.data())
def test_the_hash_tells_histories_apart(history, data):
    def hash_of(ids):
        cache = LogicalCache(N_LAYERS, N_EXPERTS, K)
        for layer in range(N_LAYERS):
            cache.observe(layer, ids[:, layer])
        return cache.hash

    changed = history.copy()
    token = data.draw(st.integers(0, len(history) - 1))
    layer = data.draw(st.integers(0, N_LAYERS - 1))
    absent = np.setdiff1d(np.arange(N_EXPERTS), history[token, layer])
    changed[token, layer, 0] = data.draw(st.sampled_from(absent.tolist()))
    assert hash_of(changed) != hash_of(history)
    swapped = history[:, ::-1]
    same = np.array_equal(np.sort(swapped, axis=2), np.sort(history, axis=2))
    assert (hash_of(swapped) == hash_of(history)) == same
    assert hash_of(history[:-1]) != hash_of(history)


def test_the_hash_is_the_same_everywhere():
    """The sum of splitmix64 over token << 32 | layer << 16 | expert, by integers of Python."""

    def scramble(x):
        mask = 2**64 - 1
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    assert scramble(0) == 0xE220A8397B1DCDAF  # the first output of splitmix64 seeded with 0
    cache = LogicalCache(60, 512, 86)
    cache.commit(59, np.array([[511, 3], [7, 3]], dtype=np.int32))
    words = [59 << 16 | 511, 59 << 16 | 3, 1 << 32 | 59 << 16 | 7, 1 << 32 | 59 << 16 | 3]
    assert cache.hash == sum(scramble(word) for word in words) % 2**64


def test_observing_feeds_the_hash_alone():
    ids = np.array([[1, 2, 3]], dtype=np.int32)
    watched, committed = (LogicalCache(N_LAYERS, N_EXPERTS, K) for _ in range(2))
    assert watched.observe(0, ids) == 0
    assert watched.observe(0, ids) == 1
    committed.commit(0, np.concatenate([ids, ids]))
    assert watched.hash == committed.hash
    assert not watched.mask(0).any()
    assert committed.mask(0).sum() == K


@given(token_histories(), token_histories())
def test_a_restored_cache_goes_on_as_if_nothing_had_happened(history, detour):
    cache, twin = (LogicalCache(N_LAYERS, N_EXPERTS, 4) for _ in range(2))
    for layer in range(N_LAYERS):
        cache.commit(layer, history[:, layer])
        twin.commit(layer, history[:, layer])
    snapshot = cache.snapshot()
    for _ in range(2):
        cache.commit(0, detour[:, 0])
        cache.restore(snapshot)
    for layer in range(N_LAYERS):
        cache.commit(layer, history[:, layer])
        twin.commit(layer, history[:, layer])
        np.testing.assert_array_equal(cache.mask(layer), twin.mask(layer))
    assert cache.hash == twin.hash


def test_a_token_larger_than_the_cache_is_refused():
    with pytest.raises(ConfigError, match="at least 3"):
        LogicalCache(1, 8, 2).commit(0, np.array([[0, 1, 2]], dtype=np.int32))


@pytest.mark.parametrize(("n_experts", "capacity"), [(8, 0), (8, 9), (70_000, 1)])
def test_sizes_that_do_not_fit_are_refused(n_experts, capacity):
    with pytest.raises(ConfigError):
        LogicalCache(1, n_experts, capacity)


def profile(rng):
    return np.round(rng.random((N_LAYERS, N_EXPERTS)), 1).astype(np.float32)


@pytest.mark.parametrize("eviction", ["lru", "lfru", "mass"])
def test_a_warm_cache_holds_the_most_frequent_and_lets_the_rarest_go_first(eviction):
    rng = np.random.default_rng(4)
    rules = LogicalRules(capacity=5, eviction=eviction)
    caches = LogicalCaches(2, N_LAYERS, N_EXPERTS, rules)
    frequencies = profile(rng)
    caches.warm(frequencies)
    for layer, row in enumerate(frequencies):
        best = np.argsort(-row, kind="stable")
        assert np.flatnonzero(caches.mask(layer)[1]).tolist() == sorted(best[:5].tolist())
        newcomer = best[-1:].astype(np.int32)
        p = np.zeros((2, 1, N_EXPERTS), np.float32)
        caches.commit(layer, np.tile(newcomer, (2, 1, 1)), None, p)
        expected = {*best[:4].tolist(), int(newcomer[0])}
        tied = row[best[4]] == row[best[3]]
        assert tied or set(np.flatnonzero(caches.mask(layer)[0]).tolist()) == expected
    caches.reset()
    assert not caches.resident.any()
    assert not caches.tokens.any()


def test_profiles_that_do_not_fit_are_refused():
    caches = LogicalCaches(1, N_LAYERS, N_EXPERTS, LogicalRules(capacity=5))
    with pytest.raises(ConfigError, match="a profile of"):
        caches.warm(np.zeros((N_LAYERS, N_EXPERTS + 1), np.float32))
    with pytest.raises(ConfigError, match="shares from 0 to 1"):
        caches.warm(np.full((N_LAYERS, N_EXPERTS), np.nan, np.float32))


def test_mass_needs_probabilities():
    caches = LogicalCaches(1, 1, 4, LogicalRules(capacity=2, eviction="mass"))
    with pytest.raises(ConfigError, match="probabilities"):
        caches.commit(0, np.zeros((1, 1, 1), np.int32))


@pytest.mark.parametrize(
    "given",
    [
        {"eviction": "fifo"}, {"decay": Fraction(1)}, {"decay": Fraction(0)}, {"shift": 12},
        {"delay": 0}, {"warmup": -1}, {"backfill": Fraction(-1, 2)},
        {"backfill": Fraction(1, 10**30)},
    ],
)  # fmt: skip
def test_rules_that_make_no_sense_are_refused(given):
    with pytest.raises(ConfigError):
        LogicalRules(capacity=4, **given)


def test_more_reads_under_way_than_places_are_refused():
    with pytest.raises(ConfigError, match="background reads"):
        LogicalCaches(1, 1, 8, LogicalRules(capacity=4, backfill=Fraction(2)))


def test_wishes_that_were_not_granted_count():
    """LFRU counts what the router wanted, though something else ran."""
    rules = LogicalRules(capacity=2)
    caches = LogicalCaches(1, 1, 6, rules)
    exact, drop = Decider(ExactRouting(), caches, 1), Decider(DropRouting(9.0, 0), caches, 1)

    def want(decider, expert):
        scores = np.zeros((1, 6), np.float32)
        scores[0, expert] = 5
        decider.decide(0, scores)

    want(exact, 0)
    for _ in range(5):
        want(exact, 1)
    for _ in range(20):
        want(drop, 2)
    want(exact, 2)  # the count of 21 wishes is 2's from the first moment
    want(exact, 3)
    assert np.flatnonzero(caches.mask(0)[0]).tolist() == [2, 3]
