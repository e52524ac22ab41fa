"""The native steps against those in Python: the same arrays, the same state, call by call."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference_waves import ReferenceWaves

from fomoe.engine._engine import landed, part_addresses
from fomoe.engine.ahead import AheadArrays
from fomoe.engine.decisions import Decider
from fomoe.engine.meter import HostCounters
from fomoe.engine.transfers import ENTRY, SegmentSlots
from fomoe.engine.waves import Priorities, StepArrays, WaveLayout, WavePlanner
from fomoe.errors import EngineError
from fomoe.residency import (
    LFRU,
    LRU,
    LogicalCache,
    LogicalCaches,
    LogicalRules,
    Residency,
    Topology,
)
from fomoe.residency.reference import ReferenceResidency
from fomoe.routing import PriceRouting, Route, route_exact
from fomoe.types import ExpertKey, Tier

MAX_TOKENS, PRIORITIES = 6, (7, 9, 11)


class Step:
    """Arrays of one step."""

    def __init__(self, max_tokens, top_k, n_experts):
        pairs, most = max_tokens * top_k, min(max_tokens * top_k, n_experts)
        self.order = np.zeros((max_tokens, top_k), np.int32)
        self.weights = np.zeros((max_tokens, top_k), np.float32)
        self.pair_token = np.zeros(pairs, np.int32)
        self.pair_start = np.zeros(most + 1, np.int32)
        self.entries = np.zeros(most, ENTRY)
        self.arrays = StepArrays(
            self.order, self.weights, self.pair_token, self.pair_start, self.entries
        )


class Engines:
    """A native planner and its oracle over twins of everything."""

    def __init__(self, rng, policy, ram):
        self.rng = rng
        self.n_layers, self.n_experts = int(rng.integers(1, 5)), int(rng.integers(4, 40))
        self.top_k = int(rng.integers(1, min(self.n_experts, 8)))
        nodes = [(0,), (0, 0), (0, 1)][rng.integers(3)]
        layer_device = (np.arange(self.n_layers) % len(nodes)).astype(np.int32)
        layer_class = rng.integers(0, 2, self.n_layers).astype(np.int32)
        pools = sorted(set(zip(layer_device.tolist(), layer_class.tolist(), strict=True)))
        most = self.n_experts * self.n_layers
        topology = Topology(
            n_layers=self.n_layers, n_experts=self.n_experts, layer_device=layer_device,
            layer_class=layer_class, device_node=nodes,
            device_slots={p: int(rng.integers(2 * self.top_k, most + 9)) for p in pools},
            ram_slots={p: int(rng.integers(0, most)) for p in {(nodes[d], c) for d, c in pools}},
        )  # fmt: skip
        self.layout = WaveLayout(
            layer_node=np.array([nodes[d] for d in layer_device], np.int32),
            layer_device=layer_device,
            expert_bytes=1000 + layer_class.astype(np.int64),
        )
        native, reference = (
            Residency(topology, policy, ram),
            ReferenceResidency(topology, policy, ram),
        )
        self.segments = [segments_of(topology, self.n_experts) for _ in range(2)]
        if rng.random() < 0.5:
            keys = [ExpertKey(i, e) for i in range(self.n_layers) for e in range(self.n_experts)]
            for residency, segments in ((native, self.segments[0]), (reference, self.segments[1])):
                for placement in residency.fill(keys):
                    segments[self.layout.layer_node[placement.key.layer]].fill([placement])
        self.ahead = [AheadArrays(self.n_layers, self.n_experts, 0.1) for _ in "ab"]
        allowed = rng.random(self.ahead[0].allowed.shape) < 0.7
        for arrays in self.ahead:
            arrays.allowed[:] = allowed
            arrays.credit[0] = 20_000
        self.native = WavePlanner(
            native, self.segments[0], self.layout, Priorities(*PRIORITIES), self.ahead[0],
            max_tokens=MAX_TOKENS, top_k=self.top_k,
        )  # fmt: skip
        self.reference = ReferenceWaves(
            reference,
            self.segments[1],
            self.layout,
            PRIORITIES,
            self.ahead[1],
            MAX_TOKENS,
            self.top_k,
        )
        self.residencies = native, reference
        self.logical = [
            LogicalCache(self.n_layers, self.n_experts, LogicalRules(capacity=self.n_experts))
            for _ in "ab"
        ]
        rules = LogicalRules(
            capacity=int(rng.integers(self.top_k, self.n_experts + 1)), backfill=Fraction(1, 2)
        )
        if rules.most_in_flight > rules.capacity:
            rules = LogicalRules(capacity=rules.capacity)
        self.deciders = [
            Decider(rule, LogicalCaches(1, self.n_layers, self.n_experts, rules), self.top_k)
            for rule in (PriceRouting(0.1, 1), PriceRouting(0.1, 1))
        ]
        self.step = Step(MAX_TOKENS, self.top_k, self.n_experts)
        self.popularity = 2 * rng.normal(size=(self.n_layers, self.n_experts))

    def scores(self, layer, tokens):
        noise = self.rng.normal(size=(tokens, self.n_experts))
        return (self.popularity[layer] + noise).astype(np.float32)

    def run(self, layer, tokens):
        """A step of a layer with guesses for the next one between its waves, as in the loop."""
        scores = self.scores(layer, tokens)
        if tokens == 1 and self.rng.random() < 0.5:
            n_reads = self.native.decide_by(layer, scores, self.deciders[0], None, self.step.arrays)
            self.reference.decide_by(layer, scores, self.deciders[1])
        elif self.rng.random() < 0.7:
            n_reads = self.native.decide(layer, scores, self.logical[0], self.step.arrays)
            self.reference.decide(layer, scores, self.logical[1])
            route = route_exact(scores, self.top_k)
            np.testing.assert_array_equal(self.native.arrays.ids[:tokens], route.ids)
            np.testing.assert_array_equal(self.native.arrays.weights[:tokens], route.weights)
        else:
            exact = route_exact(scores, self.top_k)
            substituted = self.rng.random(exact.ids.shape) < 0.3
            route = Route(exact.ids, exact.weights * np.float32(0.9), substituted)
            n_reads = self.native.place(layer, route, self.step.arrays)
            self.reference.place(layer, route)
        self.same_wave(n_reads)
        self.same_step(tokens)
        if self.rng.random() < 0.1:
            self.read_later(layer)
        if self.rng.random() < 0.6:
            for depth in range(1, int(self.rng.integers(1, 3)) + 1):
                self.look_ahead((layer + depth) % self.n_layers, depth)
        while self.reference.end < len(self.reference.experts):
            self.release(layer)
            n_reads = self.native.wave()
            self.reference.wave()
            self.same_wave(n_reads)
        self.release(layer)

    def release(self, layer):
        for residency in self.residencies:
            residency.release(layer)

    def look_ahead(self, layer, depth):
        scores = self.scores(layer, int(self.rng.integers(1, 3)))
        if self.rng.random() < 0.1:
            scores[0, 0] = np.nan
        n_reads = self.native.look_ahead(layer, scores, depth)
        self.reference.look_ahead(layer, scores, depth)
        self.same_reads(n_reads)

    def read_later(self, layer):
        n = int(self.rng.integers(0, self.top_k + 1))
        experts = self.rng.permutation(self.n_experts)[:n].astype(np.int32)
        n_reads = self.native.read_later(layer, experts)
        self.reference.read_later(layer, experts)
        self.same_reads(n_reads)

    def forget(self):
        layer = int(self.rng.integers(self.n_layers))
        present = np.flatnonzero(self.residencies[0].mask(layer))
        if present.size:
            key = ExpertKey(layer, int(self.rng.choice(present)))
            self.native.forget(key)
            self.reference.forget(key)

    def same_reads(self, n_reads):
        want = self.reference.reads
        assert self.native.arrays.reads[:n_reads].tolist() == want.tolist()
        np.testing.assert_array_equal(self.native.arrays.counts, self.reference.counts)
        np.testing.assert_array_equal(self.native.arrays.unproven, self.reference.unproven)
        np.testing.assert_array_equal(self.native.arrays.background, self.reference.background)
        for name in ("named", "wanted", "charged", "misses", "credit"):
            got, wanted = (getattr(arrays, name) for arrays in self.ahead)
            np.testing.assert_array_equal(got, wanted, err_msg=name)

    def same_wave(self, n_reads):
        want, got = self.reference, self.native
        self.same_reads(n_reads)
        assert (got.first, got.end, got.n_experts) == (want.first, want.end, len(want.experts))
        assert self.step.entries[want.first : want.end].tolist() == want.entries

    def same_step(self, tokens):
        want, arrays, n = self.reference, self.native.arrays, self.native.n_experts
        np.testing.assert_array_equal(arrays.experts[:n], want.experts)
        np.testing.assert_array_equal(arrays.pairs[:n], want.pairs)
        pairs = tokens * self.top_k
        for name, end in (
            ("order", tokens), ("weights", tokens), ("pair_token", pairs), ("pair_start", n + 1),
        ):  # fmt: skip
            got, wanted = getattr(self.step, name)[:end], getattr(want, name)[:end]
            np.testing.assert_array_equal(got, wanted, err_msg=name)

    def same_state(self):
        assert self.logical[0].hash == self.logical[1].hash
        assert self.deciders[0].caches.hashes[0] == self.deciders[1].caches.hashes[0]
        for tier in (Tier.DEVICE, Tier.RAM):
            a, b = (residency.slots(tier) for residency in self.residencies)
            np.testing.assert_array_equal(a, b)
        for a, b in zip(*self.segments, strict=True):
            for name in ("slot_of", "holder", "generation", "free_count"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        self.residencies[0].check_integrity()


def segments_of(topology, n_experts):
    segments = []
    for node in range(max(topology.device_node) + 1):
        counts = {}
        for (device, c), n in topology.device_slots.items():
            if topology.device_node[device] == node:
                counts[c] = counts.get(c, 0) + n
        for (where, c), n in topology.ram_slots.items():
            if where == node:
                counts[c] = counts.get(c, 0) + n
        classes = {c: (n, 4096 * (1 + c)) for c, n in counts.items()}
        segments.append(SegmentSlots(classes, topology.layer_class, n_experts))
    return segments


@pytest.mark.parametrize("ram", ["exclusive", "inclusive"])
@pytest.mark.parametrize("policy", [LRU, LFRU])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_long_histories(ram, policy, seed):
    rng = np.random.default_rng(seed)
    engines = Engines(rng, policy(), ram)
    for _ in range(25):
        tokens = 1 if rng.random() < 0.6 else int(rng.integers(1, MAX_TOKENS + 1))
        engines.run(int(rng.integers(engines.n_layers)), tokens)
        if rng.random() < 0.1:
            engines.forget()
        engines.same_state()


def small():
    return Engines(np.random.default_rng(3), LRU(), "exclusive")


def entries_of(slots, generations, experts=None):
    entries = np.zeros(len(slots), ENTRY)
    entries["slot"], entries["generation"] = slots, generations
    if experts is not None:
        entries["expert"] = experts
    return entries


def test_what_has_landed():
    words = np.array([0, 0, 2**64 - 1, 0, 5, 0], np.uint64)
    ready = np.full(4, 9, np.uint8)
    entries = entries_of([4, 0, 2, 4], np.array([5, 1, 7, 6], np.uint64))
    assert landed(words, entries, ready) == 2
    assert ready.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("slot", [-1, 6])
def test_landed_words_are_bounded(slot):
    words, ready = np.zeros(6, np.uint64), np.zeros(1, np.uint8)
    with pytest.raises(IndexError, match=f"slot {slot} of 6"):
        landed(words, entries_of([slot], [1]), ready)
    with pytest.raises(ValueError, match="length of ready"):
        landed(words, entries_of([0, 1], [1, 1]), ready)


def test_addresses_of_parts():
    parts = np.array([[100, 200], [110, 210], [120, 220]], np.uint64)
    entries = entries_of([0, 0, 0], [0, 0, 0], [1, 0, 1])
    entries["address"] = [1000, 2000, 2**40]
    out = np.zeros((3, 3), np.uint64)
    part_addresses(parts, entries, out)
    assert out.tolist() == [
        [1200, 2100, 2**40 + 200], [1210, 2110, 2**40 + 210], [1220, 2120, 2**40 + 220]
    ]  # fmt: skip
    with pytest.raises(IndexError, match="no such expert"):
        part_addresses(parts, entries_of([0], [0], [2]), np.zeros((3, 1), np.uint64))
    with pytest.raises(ValueError, match="columns of out"):
        part_addresses(parts, entries, np.zeros((3, 2), np.uint64))


def test_counts_are_charged_to_prompts_and_answers_apart():
    engines = small()
    engines.native.arrays.counts[:] = range(1, 16)
    totals = HostCounters()
    engines.native.charge(totals, decoding=True)
    assert (totals.hits_device, totals.hits_ram, totals.reads_nvme) == (1, 2, 3)
    engines.native.charge(totals, decoding=False)
    assert (totals.hits_device, totals.hits_ram, totals.reads_nvme) == (1, 2, 3)
    prompt = totals.prompt_hits_device, totals.prompt_hits_ram, totals.prompt_reads_nvme
    assert prompt == (1, 2, 3)
    substitutes = totals.substitutes_device, totals.substitutes_ram, totals.substitutes_nvme
    assert substitutes == (4, 5, 6)
    assert totals.prefetch_issued == 14
    assert (totals.prefetched, totals.prefetched_used) == (15, 11)
    assert (totals.nvme_bytes, totals.ram_bytes, totals.demoted_bytes) == (16, 18, 20)
    assert (totals.background_bytes, totals.computed_in_ram) == (26, 14)


def test_a_broken_row_is_named_and_changes_nothing():
    engines = small()
    scores = engines.scores(0, 3)
    scores[1, 2] = np.inf
    with pytest.raises(EngineError, match="token 1 of 3"):
        engines.native.decide(0, scores, engines.logical[0], engines.step.arrays)
    engines.same_state()


def test_a_wave_without_experts_is_a_bug():
    engines = small()
    engines.native.decide(0, engines.scores(0, 1), engines.logical[0], engines.step.arrays)
    with pytest.raises(AssertionError, match="no experts left"):
        engines.native.wave()


def test_what_does_not_fit_is_refused():
    engines = small()
    tight = Step(1, engines.top_k, engines.n_experts).arrays
    with pytest.raises(IndexError, match="does not fit"):
        engines.native.decide(0, engines.scores(0, 2), engines.logical[0], tight)
    many = engines.scores(0, MAX_TOKENS + 1)
    with pytest.raises(IndexError, match="at most 6"):
        engines.native.decide(0, many, engines.logical[0], engines.step.arrays)
    with pytest.raises(IndexError, match="no such layer"):
        engines.native.look_ahead(engines.n_layers, engines.scores(0, 1), 1)
    with pytest.raises(IndexError, match="one or two layers"):
        engines.native.look_ahead(0, engines.scores(0, 1), 3)
    wide = np.zeros((1, engines.n_experts + 1), np.float32)
    with pytest.raises(ValueError, match="experts of a layer"):
        engines.native.decide(0, wide, engines.logical[0], engines.step.arrays)
