"""The native rules against those in Python: the same plans and the same state, step by step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe.residency import LFRU, LRU, EvictionPolicy, Residency, Topology
from fomoe.residency.reference import ReferenceResidency
from fomoe.types import ExpertKey, Tier


class Oldest(EvictionPolicy):
    """A policy that the native module does not know: few uses long ago are worth most."""

    def values(self, uses, last, step):
        return np.sqrt(step - last) - uses


class SubclassedLRU(LRU):
    """Ranks by other rules than its base class."""

    def values(self, uses, last, step):
        return -last.astype(np.float64)


POLICIES = [LRU, LFRU, Oldest, SubclassedLRU]


def test_only_exact_types_have_a_native_rule():
    assert [policy().native_rule for policy in POLICIES] == ["lru", "lfru", None, None]


def arrays_of(residency):
    state = residency._state
    for part in ("device", "ram", "history", "ram_history", "flags"):
        for name, array in vars(getattr(state, part)).items():
            yield f"{part}.{name}", array
    for name in state.counters.__slots__:
        yield f"counters.{name}", getattr(state.counters, name)


def used_slots(name, array):
    """What lies above a stack of free slots does not matter."""
    return array if not name.endswith("free_slots") else array[:0]


def assert_same_state(native, reference):
    for (name, a), (_, b) in zip(arrays_of(native), arrays_of(reference), strict=True):
        np.testing.assert_array_equal(used_slots(name, a), used_slots(name, b), err_msg=name)
    for table, twin in (
        (native._state.device, reference._state.device),
        (native._state.ram, reference._state.ram),
    ):
        for pool, (first, count) in enumerate(zip(table.free_start, table.free_count, strict=True)):
            stacks = [t.free_slots[first : first + count].tolist() for t in (table, twin)]
            assert stacks[0] == stacks[1], pool


def assert_same_plan(a, b):
    assert (a.layer, a.fetches) == (b.layer, b.fetches)
    for name in ("hits", "hit_slots"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype == np.int32


class Pair:
    """A native residency and its oracle, driven by one generator of random calls."""

    def __init__(self, rng, policy, ram):
        self.rng = rng
        self.n_layers, self.n_experts = int(rng.integers(1, 6)), int(rng.integers(3, 40))
        nodes = [(0,), (0, 0), (0, 1)][rng.integers(3)]
        layer_device = rng.integers(0, len(nodes), self.n_layers).astype(np.int32)
        layer_class = rng.integers(0, 2, self.n_layers).astype(np.int32)
        pools = set(zip(layer_device.tolist(), layer_class.tolist(), strict=True))
        most = self.n_experts * self.n_layers
        self.topology = Topology(
            n_layers=self.n_layers,
            n_experts=self.n_experts,
            layer_device=layer_device,
            layer_class=layer_class,
            device_slots={pool: int(rng.integers(1, most + 1)) for pool in sorted(pools)},
            ram_slots={
                pool: int(rng.integers(0, most))
                for pool in sorted({(nodes[d], c) for d, c in pools})
                if rng.random() < 0.8
            },
            device_node=nodes,
        )
        self.native = Residency(self.topology, policy, ram)
        self.reference = ReferenceResidency(self.topology, policy, ram)
        self.resident = rng.random((self.n_layers, self.n_experts)) < 0.4
        # Popular experts come back, so that history matters.
        self.popularity = rng.normal(size=(self.n_layers, self.n_experts))

    def both(self, call):
        return call(self.native), call(self.reference)

    def some(self, layer, n):
        score = self.popularity[layer] + self.rng.normal(size=self.n_experts)
        return np.argsort(-score)[: max(n, 0)].astype(np.int32)

    def step(self):
        rng = self.rng
        layer = int(rng.integers(self.n_layers))
        act = rng.choice(
            ["plan", "prefetch", "release", "some", "forget", "recall", "follow", "turn"],
            p=[0.4, 0.2, 0.15, 0.05, 0.05, 0.05, 0.05, 0.05],
        )
        if act == "plan":
            a, b = self.both(lambda r: r.capacity(layer))
            assert a == b
            wanted = np.sort(self.some(layer, min(int(rng.integers(0, 12)), a)))
            in_ram = wanted[self.native.tier_of(layer)[wanted] == Tier.RAM]
            in_ram = in_ram[rng.random(in_ram.size) < 0.3]
            moved = np.setdiff1d(wanted, in_ram)
            assert_same_plan(*self.both(lambda r: r.plan(layer, moved, in_ram)))
            for expert in in_ram.tolist():
                assert self.native.is_in_ram(ExpertKey(layer, expert)), "computed in RAM, and gone"
        elif act == "prefetch":
            guesses, limit = self.some(layer, int(rng.integers(0, 8))), int(rng.integers(0, 8))
            eager = bool(rng.integers(2))
            assert_same_plan(*self.both(lambda r: r.prefetch(layer, guesses, limit, eager=eager)))
        elif act == "release":
            self.both(lambda r: r.release(layer))
        elif act == "follow":
            followed = self.resident if rng.random() < 0.7 else None
            self.both(lambda r: r.follow(followed))
        elif act == "recall":
            for expert in np.flatnonzero(self.native.slots(Tier.DEVICE)[layer] >= 0)[:2]:
                key = ExpertKey(layer, int(expert))
                a, b = self.both(lambda r, key=key: r.recall(key))
                assert a == b == self.native.is_in_ram(key)
        elif act == "turn":  # both see a change of what they follow
            self.resident[layer] = rng.random(self.n_experts) < 0.4
        else:
            experts = self.some(layer, int(rng.integers(0, 4)))
            call = "release" if act == "some" else "forget"
            self.both(lambda r: getattr(r, call)(layer, experts))


@pytest.mark.parametrize("ram", ["exclusive", "inclusive"])
@pytest.mark.parametrize("policy", POLICIES)
@given(seed=st.integers(0, 2**32 - 1), fill=st.booleans())
@settings(max_examples=25, deadline=None)
def test_long_histories(ram, policy, seed, fill):
    pair = Pair(np.random.default_rng(seed), policy(), ram)
    if fill:
        keys = [ExpertKey(i, e) for i in range(pair.n_layers) for e in range(pair.n_experts)]
        a, b = pair.both(lambda r: r.fill(keys))
        assert a == b
    for _ in range(12):
        for _ in range(5):
            pair.step()
        assert_same_state(pair.native, pair.reference)
    pair.native.check_integrity()


@pytest.mark.parametrize("policy", [LRU(), LFRU()])
def test_a_large_cache(policy):
    """512 experts, four layers in a pool, as in a real model."""
    n_layers, rng = 4, np.random.default_rng(5)
    zeros = np.zeros(n_layers, np.int32)
    topology = Topology(
        n_layers=n_layers, n_experts=512, layer_device=zeros, layer_class=zeros,
        device_slots={(0, 0): 50 * n_layers}, ram_slots={(0, 0): 36 * n_layers}, device_node=(0,),
    )  # fmt: skip
    native, reference = Residency(topology, policy), ReferenceResidency(topology, policy)
    popularity = rng.normal(size=(n_layers, 512))
    for token in range(150):
        for layer in range(n_layers):
            score = 2 * popularity[layer] + rng.normal(size=512)
            wanted = np.sort(np.argpartition(-score, 10)[:10]).astype(np.int32)
            guesses = rng.permutation(wanted)
            for residency in (native, reference):
                residency.release(layer)
            if token % 3 == 0:
                assert_same_plan(
                    *(r.prefetch(layer, guesses, 10, eager=True) for r in (native, reference))
                )
            assert_same_plan(*(r.plan(layer, wanted) for r in (native, reference)))
    assert_same_state(native, reference)
    assert native.counters.lookups.sum(axis=0).min() > 100


@pytest.mark.parametrize("residency_type", [Residency, ReferenceResidency])
def test_what_is_followed_stays(residency_type):
    """Eight slots, six of them followed: all else goes round in the other two."""
    zeros = np.zeros(1, np.int32)
    topology = Topology(
        n_layers=1, n_experts=20, layer_device=zeros, layer_class=zeros,
        device_slots={(0, 0): 8}, ram_slots={}, device_node=(0,),
    )  # fmt: skip
    residency = residency_type(topology, LRU())
    kept = np.arange(6, dtype=np.int32)
    resident = np.zeros((1, 20), np.bool_)
    resident[0, kept] = True

    def run(*experts):
        plan = residency.plan(0, np.array(experts, np.int32))
        residency.release(0)
        return [fetch.expert for fetch in plan.fetches]

    run(*kept)
    residency.follow(resident)
    for first in range(6, 18, 2):
        assert run(first, first + 1) == [first, first + 1]
        assert not residency.prefetch(0, np.array([19], np.int32), 1, eager=True).fetches
    assert run(*kept) == []
    resident[0, 0], resident[0, 19] = False, True  # the decisions have moved on
    assert run(18, 19) == [18, 19]
    assert run(7) == [7]
    assert run(19) == []
    assert run(0) == [0]
    residency.follow(None)
    assert run(8, 9, 10, 11, 12, 13, 14, 15) == [8, 9, 10, 11, 12, 13, 14, 15]


def test_ids_out_of_range_are_refused():
    pair = Pair(np.random.default_rng(1), LRU(), "exclusive")
    bad = np.array([pair.n_experts], np.int32)
    with pytest.raises(AssertionError, match="ascend"):
        pair.native.plan(0, bad)
    for call in (pair.native.forget, pair.native.release):
        with pytest.raises(IndexError, match=f"expert {pair.n_experts} of"):
            call(0, bad)
    with pytest.raises(IndexError, match=f"layer {pair.n_layers} of"):
        pair.native.capacity(pair.n_layers)
    followed = np.zeros((pair.n_layers, pair.n_experts), np.bool_)
    pair.native.follow(followed)
    with pytest.raises((ValueError, AssertionError)):
        pair.native.follow(np.zeros((pair.n_layers + 1, pair.n_experts), np.bool_))
    assert pair.native._followed is followed  # native rules still read it
