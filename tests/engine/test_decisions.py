"""The decider against the reference rules and caches, to the bit, step by step."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference_decisions import ReferenceDecider

from fomoe.engine.decisions import Decider, Decisions
from fomoe.errors import ConfigError, EngineError
from fomoe.residency import LogicalCaches, LogicalRules
from fomoe.routing import CacheAwareRouting, DropRouting, ExactRouting, PriceRouting

S, L = 3, 2
RULES = st.sampled_from(
    [
        ExactRouting(),
        CacheAwareRouting(0.35),
        CacheAwareRouting(0.2, 1, True),
        PriceRouting(0.05),
        PriceRouting(0.2, 0, 0.5, (0.5, 2.0)),
        DropRouting(0.2, 1, 0.0),
        DropRouting(0.3, 0, 1.0, (0.5, 2.0)),
    ]
)


@st.composite
def setups(draw):
    n = draw(st.sampled_from([5, 9, 17, 24]))
    k = draw(st.integers(1, 4))
    rules = LogicalRules(
        capacity=draw(st.integers(k, n)),
        eviction=draw(st.sampled_from(["lru", "lfru", "mass"])),
        decay=draw(st.sampled_from([Fraction(99, 100), Fraction(1, 2), Fraction(999, 1000)])),
        shift=draw(st.sampled_from([1, 6, 11])),
        backfill=draw(st.sampled_from([Fraction(0), Fraction(28, 60), Fraction(1)])),
        delay=draw(st.sampled_from([1, 2])) if k > 3 else 1,
        warmup=draw(st.sampled_from([0, 2])),
    )
    if rules.most_in_flight > rules.capacity:
        rules = LogicalRules(capacity=rules.capacity, eviction=rules.eviction)
    return draw(RULES), n, k, rules


def scores_of(rng, rows, n, spread):
    scores = rng.normal(0, spread, (rows, n)).astype(np.float32)
    return np.round(scores) if rng.random() < 0.3 else scores


def check(got, want, row):
    for name, values in want.items():
        found = getattr(got, name)[row]
        if name == "weights":
            values = np.array(values, np.float32).view(np.int32)
            found = found.view(np.int32)
        np.testing.assert_array_equal(found, values, err_msg=name)


def check_caches(caches, twin):
    for s in range(S):
        assert int(caches.hashes[s]) == twin.hash(s)
        for layer in range(L):
            np.testing.assert_array_equal(caches.mask(layer)[s], twin.mask(s, layer))
            members = caches.members[s, layer, : caches.held[s, layer]]
            assert sorted(members) == np.flatnonzero(caches.mask(layer)[s]).tolist()


@settings(max_examples=60, deadline=None)
@given(setups(), st.integers(0, 2**32 - 1), st.booleans())
def test_every_decision_has_the_bits_of_the_reference(setup, seed, compact):
    rule, n, k, rules = setup
    rng = np.random.default_rng(seed)
    caches = LogicalCaches(S, L, n, rules)
    decider, twin = Decider(rule, caches, k), ReferenceDecider(rule, (S, L, n), rules, k)
    for _ in range(12):
        rows = rng.permutation(S)[: rng.integers(0, S + 1)].astype(np.int32)
        layer = int(rng.integers(0, L))
        scores = scores_of(rng, len(rows), n, rng.choice([0.5, 2.0, 20.0]))
        if rng.random() < 0.2:  # a chunk of a prompt
            tokens = int(rng.integers(1, 4))
            ids = rng.random((len(rows), tokens, n)).argsort(axis=2)[:, :, :k].astype(np.int32)
            p = rng.random((len(rows), tokens, n)).astype(np.float32)
            caches.commit(layer, ids, rows, p)
            for i, s in enumerate(rows):
                twin.commit(layer, s, ids[i], p[i])
        elif compact:
            width = int(rng.integers(k, n + 1))
            ids = np.argsort(-scores, axis=1, kind="stable")[:, :width].astype(np.int32)
            p = np.sort(rng.random(ids.shape).astype(np.float32))[:, ::-1].copy()
            want = twin.decide_compact(layer, ids, p, rows)
            got = decider.decide_compact(layer, ids, p, rows)
            for row, one in enumerate(want):
                check(got, one, row)
        else:
            want = twin.decide(layer, scores, rows)
            got = decider.decide(layer, scores, rows)
            for row, one in enumerate(want):
                check(got, one, row)
        check_caches(caches, twin)


def run(seed, threads, order, splits):
    """Decide the same tokens in one order or another; returns everything that came of it."""
    rng = np.random.default_rng(seed)
    rules = LogicalRules(capacity=6, backfill=Fraction(28, 60))
    caches = LogicalCaches(S, L, 20, rules)
    decider = Decider(PriceRouting(0.1), caches, 3, threads=threads)
    tokens = rng.normal(0, 2, (8, L, S, 20)).astype(np.float32)
    ids = np.zeros((8, L, S, 3), np.int32)
    steps = [(t, layer) for t in range(8) for layer in range(L)]
    if order == "by layer":
        steps.sort(key=lambda step: (step[1], step[0]))
    for t, layer in steps:
        for rows in splits:
            rows = np.array(rows, np.int32)
            ids[t, layer, rows] = decider.decide(layer, tokens[t, layer][rows], rows).ids
    return ids, caches.hashes.copy(), caches.resident.copy()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("order", ["by token", "by layer"])
@pytest.mark.parametrize("splits", [[[0, 1, 2]], [[2], [0, 1]]])
def test_threads_neighbours_and_the_order_of_layers_do_not_matter(threads, order, splits):
    want = run(5, 1, "by token", [[0, 1, 2]])
    for a, b in zip(run(5, threads, order, splits), want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(np.unique(want[1])) == S


def test_a_snapshot_takes_back_whatever_was_decided():
    rng = np.random.default_rng(1)
    rules = LogicalRules(capacity=5, backfill=Fraction(1, 2), delay=2)
    caches, twin = (LogicalCaches(S, L, 16, rules) for _ in "ab")
    one, other = (Decider(CacheAwareRouting(0.3), c, 3) for c in (caches, twin))
    tokens = rng.normal(0, 2, (20, S, 16)).astype(np.float32)
    for token in tokens[:10]:
        one.decide(0, token)
        other.decide(0, token)
    snapshot = caches.snapshot()
    for token in tokens[::-1]:
        one.decide(0, token)
    assert not np.array_equal(caches.hashes, twin.hashes)
    caches.restore(snapshot)
    for token in tokens[10:]:
        np.testing.assert_array_equal(one.decide(0, token).ids, other.decide(0, token).ids)
    np.testing.assert_array_equal(caches.hashes, twin.hashes)
    assert caches.counts() == twin.counts()


def test_counts_add_up():
    rng = np.random.default_rng(2)
    for rule in (CacheAwareRouting(0.3), PriceRouting(0.1), DropRouting(0.2)):
        caches = LogicalCaches(S, L, 24, LogicalRules(capacity=6, backfill=Fraction(1, 2)))
        decider = Decider(rule, caches, 4)
        reads = background = 0
        for _ in range(40):
            d = decider.decide(1, rng.normal(0, 1.5, (S, 24)).astype(np.float32))
            reads += int(d.read.sum())
            background += int((d.background >= 0).sum())
        c = caches.counts()
        assert c.missed == c.demand + c.joined + c.substituted + c.dropped
        assert (c.demand, c.background) == (reads, background)
        assert min(c.demand, c.joined, c.background, c.substituted + c.dropped) > 0


def test_backfill_gives_a_token_its_share_of_reads():
    """28 reads per token of 60 layers, as long as each layer leaves something out."""
    caches = LogicalCaches(1, 60, 64, LogicalRules(capacity=8, backfill=Fraction(28, 60)))
    decider = Decider(DropRouting(9.0, 0), caches, 8)
    rng = np.random.default_rng(0)
    for token in range(20):
        scores = rng.normal(size=(60, 1, 64)).astype(np.float32)
        issued = [decider.decide(i, scores[i]).background[0] >= 0 for i in range(60)]
        assert np.sum(issued) == 28, token


def test_a_background_read_is_resident_two_tokens_later():
    caches = LogicalCaches(1, 1, 8, LogicalRules(capacity=4, backfill=Fraction(1)))
    decider = Decider(DropRouting(9.0, 0), caches, 1)
    scores = np.zeros((3, 1, 8), np.float32)
    scores[0, 0, 5] = scores[1, 0, 6] = scores[2, 0, 5] = 9
    assert decider.decide(0, scores[0]).background[0, 0] == 5
    assert not caches.mask(0)[0].any()
    decider.decide(0, scores[1])
    assert caches.mask(0)[0].tolist() == [e == 5 for e in range(8)]
    got = decider.decide(0, scores[2])
    assert (got.ids[0, 0], got.read[0, 0]) == (5, False)


def test_a_demand_read_joins_a_background_read():
    caches = LogicalCaches(1, 1, 8, LogicalRules(capacity=4, backfill=Fraction(1)))
    drop, exact = Decider(DropRouting(9.0, 0), caches, 1), Decider(ExactRouting(), caches, 1)
    scores = np.zeros((1, 8), np.float32)
    scores[0, 5] = 9
    drop.decide(0, scores)
    got = exact.decide(0, scores)
    assert (got.ids[0, 0], got.read[0, 0]) == (5, False)
    assert caches.counts().joined == 1
    assert caches.mask(0)[0, 5]


def test_a_price_of_the_row_takes_the_place_of_the_rules_own():
    rng = np.random.default_rng(3)
    scores = rng.normal(0, 1, (2, 32)).astype(np.float32)
    rules = LogicalRules(capacity=8)
    caches, cheap, dear = (LogicalCaches(2, 1, 32, rules) for _ in "abc")
    for c in (caches, cheap, dear):
        c.commit(0, np.tile(np.arange(8, dtype=np.int32), (2, 1, 1)))
    prices = np.array([0.0, 0.5], np.float32)
    got = Decider(PriceRouting(0.1, 0), caches, 4).decide(0, scores, prices=prices)
    want = [
        Decider(PriceRouting(p, 0), c, 4).decide(0, scores) for p, c in ((0.0, cheap), (0.5, dear))
    ]
    for row in range(2):
        np.testing.assert_array_equal(got.ids[row], want[row].ids[row])
    assert got.substituted.any(axis=1).tolist() == [False, True]
    assert caches.hashes.tolist() == [int(cheap.hashes[0]), int(dear.hashes[1])]


def test_the_price_is_part_of_the_hash():
    rules = LogicalRules(capacity=8)
    hashes = set()
    for price in (0.0, 1e-6, 2e-6):
        caches = LogicalCaches(1, 1, 8, rules)
        Decider(PriceRouting(price), caches, 2).decide(0, np.zeros((1, 8), np.float32))
        hashes.add(int(caches.hashes[0]))
    assert len(hashes) == 3


def test_a_broken_row_decides_nothing():
    caches = LogicalCaches(2, 1, 8, LogicalRules(capacity=4))
    scores = np.zeros((2, 8), np.float32)
    scores[1, 2] = np.nan
    with pytest.raises(EngineError, match="token 1 of 2"):
        Decider(ExactRouting(), caches, 2).decide(0, scores)
    assert not caches.tokens.any()
    assert not caches.hashes.any()


def test_what_does_not_fit_is_refused():
    caches = LogicalCaches(2, 3, 8, LogicalRules(capacity=4))
    with pytest.raises(ConfigError, match="at least 5"):
        Decider(ExactRouting(), caches, 5)
    with pytest.raises(ConfigError, match="2 layer sensitivities for 3"):
        Decider(PriceRouting(0.1, sensitivities=(1.0, 1.0)), caches, 2)
    with pytest.raises(ConfigError, match="threads"):
        Decider(ExactRouting(), caches, 2, threads=0)
    decider = Decider(ExactRouting(), caches, 2)
    scores = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match="two rows"):
        decider.decide(0, scores, np.array([1, 1], np.int32))
    with pytest.raises(IndexError, match="sequence 2 of 2"):
        decider.decide(0, scores, np.array([0, 2], np.int32))
    with pytest.raises(IndexError):
        decider.decide(3, scores)
    with pytest.raises(ValueError, match="length of lost"):
        decider.decide(0, scores, out=Decisions.empty(1, 2))
    with pytest.raises(IndexError, match="expert"):
        decider.decide_compact(0, np.full((2, 3), 8, np.int32), np.ones((2, 3), np.float32))
