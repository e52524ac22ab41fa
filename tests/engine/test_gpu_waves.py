"""The native steps of GPU nodes against those in Python: the same records, the same state."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference_gpu_waves import ReferenceGpuWaves
from support.simulated_machine import (
    MAX_TOKENS,
    StepMemory,
    draw_topology,
    gpu_segments,
    layer_bytes,
)

from fomoe.engine.ahead import AheadArrays
from fomoe.engine.copies import COPY, CopyKind, Outcome
from fomoe.engine.decisions import Decider
from fomoe.engine.gpu_segment import Reading
from fomoe.engine.waves import Priorities, WaveLayout, WavePlanner
from fomoe.residency import (
    LFRU,
    LRU,
    LogicalCaches,
    LogicalRules,
    Residency,
)
from fomoe.residency.reference import ReferenceResidency
from fomoe.routing import PriceRouting, Route, route_exact
from fomoe.types import ExpertKey, Tier

PRIORITIES = (7, 9, 11)


class Twins:
    """A native planner and its oracle; devices answer what they were sent in any order."""

    def __init__(self, rng, policy, ram):
        self.rng = rng
        self.top_k, t = draw_topology(rng)
        self.topology = t
        self.layout = WaveLayout(
            layer_node=np.array([t.device_node[d] for d in t.layer_device], np.int32),
            layer_device=t.layer_device, expert_bytes=layer_bytes(t),
        )  # fmt: skip
        self.residencies = Residency(t, policy, ram), ReferenceResidency(t, policy, ram)
        staging = int(rng.integers(2, 8 * self.top_k))
        self.segments = gpu_segments(t, staging), gpu_segments(t, staging)
        self.ahead = [AheadArrays(t.n_layers, t.n_experts, 0.1) for _ in "ab"]
        allowed = rng.random(self.ahead[0].allowed.shape) < 0.7
        for arrays in self.ahead:
            arrays.allowed[:] = allowed
            arrays.credit[0] = 20_000
        self.native = WavePlanner(
            self.residencies[0], self.segments[0], self.layout, Priorities(*PRIORITIES),
            self.ahead[0], max_tokens=MAX_TOKENS, top_k=self.top_k,
        )  # fmt: skip
        arm = np.minimum(rng.integers(0, 4, self.top_k + 1), np.arange(self.top_k + 1))
        arm *= rng.integers(2)  # nothing is brought ahead beside an arm
        self.native.arrays.arm[:] = arm
        self.reference = ReferenceGpuWaves(
            self.residencies[1], self.segments[1], self.layout, PRIORITIES, self.ahead[1],
            MAX_TOKENS, self.top_k, arm=arm.tolist(),
        )  # fmt: skip
        capacity = int(rng.integers(self.top_k, t.n_experts + 1))
        rules = LogicalRules(capacity=capacity, backfill=Fraction(1, 2))
        if rules.most_in_flight > rules.capacity:
            rules = LogicalRules(capacity=capacity)
        self.deciders = [
            Decider(rule, LogicalCaches(1, t.n_layers, t.n_experts, rules), self.top_k)
            for rule in (PriceRouting(0.1, 1), PriceRouting(0.1, 1))
        ]
        self.step = StepMemory(self.top_k, t.n_experts)
        self.popularity = 2 * rng.normal(size=(t.n_layers, t.n_experts))
        self.unanswered = []

    def scores(self, layer, tokens):
        noise = self.rng.normal(size=(tokens, self.topology.n_experts))
        return (self.popularity[layer] + noise).astype(np.float32)

    def run(self, layer, tokens):
        device = int(self.topology.layer_device[layer])
        self.answer(device, layer)
        scores = self.scores(layer, tokens)
        if self.native.is_tight(layer):
            for other in range(int(self.topology.layer_device.max()) + 1):
                self.answer(other, layer)
        if tokens == 1 and self.rng.random() < 0.4:
            n_reads = self.native.decide_by(layer, scores, self.deciders[0], None, self.step.arrays)
            self.reference.decide_by(layer, scores, self.deciders[1])
        else:
            exact = route_exact(scores, self.top_k)
            route = Route(exact.ids, exact.weights, self.rng.random(exact.ids.shape) < 0.3)
            n_reads = self.native.place(layer, route, self.step.arrays)
            self.reference.place(layer, route)
        self.same_wave(n_reads)
        if self.reference.end == len(self.reference.experts) and self.rng.random() < 0.7:
            self.native.give_up_guesses()
            self.reference.give_up_guesses()
            self.same_reads(0)
        for depth in range(1, int(self.rng.integers(0, 3)) + 1):
            self.look_ahead((layer + depth) % self.topology.n_layers, depth)
        while self.reference.end < len(self.reference.experts):
            for other in range(int(self.topology.layer_device.max()) + 1):
                self.answer(other, layer)
            n_reads = self.native.wave()
            self.reference.wave()
            self.same_wave(n_reads)
        if self.rng.random() < 0.7:
            self.answer(device, layer)

    def answer(self, device, layer):
        """A device answers for its wave, if there is one."""
        aborted = bool(self.rng.random() < 0.1)
        self.native.answered(device, aborted=aborted)
        self.reference.answered(device, aborted=aborted)
        for residency in self.residencies:
            for mine in np.flatnonzero(self.topology.layer_device == device):
                residency.release(int(mine))

    def look_ahead(self, layer, depth):
        scores = self.scores(layer, int(self.rng.integers(1, 3)))
        if self.rng.random() < 0.1:
            scores[0, 0] = np.nan
        n_reads = self.native.look_ahead(layer, scores, depth)
        self.reference.look_ahead(layer, scores, depth)
        self.same_reads(n_reads)

    def read_later(self, layer):
        experts = self.rng.permutation(self.topology.n_experts)[: self.top_k].astype(np.int32)
        n_reads = self.native.read_later(layer, experts)
        self.reference.step_copies = np.empty(0, COPY)
        self.reference.read_later(layer, experts)
        self.same_reads(n_reads)

    def some_end(self):
        """Some records of ahead lists are answered; a demotion is never dropped."""
        which = self.rng.random(len(self.unanswered)) < 0.5
        ended = np.array([tuple(r) for r, e in zip(self.unanswered, which, strict=True) if e], COPY)
        self.unanswered = [r for r, e in zip(self.unanswered, which, strict=True) if not e]
        self.rng.shuffle(ended)
        dropped = (self.rng.random(len(ended)) < 0.2) & (ended["kind"] == CopyKind.LOAD)
        ended["outcome"] = np.where(dropped, Outcome.DROPPED, Outcome.DONE)
        self.native.ended(ended)
        self.reference.ended(ended)

    def disturb(self):
        """Storage may be writing to any free slot, for all that is known."""
        for a, b in zip(*self.segments, strict=True):
            for first, count in zip(a.class_first, a.free_count, strict=True):
                slots = a.free_slots[first : first + count]
                noisy = slots[self.rng.random(count) < 0.9]
                a.reading[noisy] = b.reading[noisy] = Reading.IDLE

    def forget(self):
        layer = int(self.rng.integers(self.topology.n_layers))
        present = np.flatnonzero(self.residencies[0].mask(layer))
        if present.size:
            key = ExpertKey(layer, int(self.rng.choice(present)))
            self.native.forget(key)
            cancelled = self.native.take_cancelled(int(self.topology.layer_device[layer]))
            assert cancelled.tolist() == self.reference.forget(key).tolist()
            assert self.native.take_cancelled(int(self.topology.layer_device[layer])).size == 0

    def same_reads(self, n_reads):
        native, want = self.native, self.reference
        assert native.arrays.reads[:n_reads].tolist() == want.reads.tolist()
        assert native.step_copies.tolist() == want.step_copies.tolist()
        assert native.ahead_copies.tolist() == want.ahead_copies.tolist()
        self.unanswered += [c for c in native.ahead_copies.copy() if c["kind"] != CopyKind.CANCEL]
        for name in ("counts", "unproven", "background"):
            got, wanted = getattr(native.arrays, name), getattr(want, name)
            np.testing.assert_array_equal(got, wanted, err_msg=name)
        for name in ("named", "wanted", "charged", "misses", "credit"):
            got, wanted = (getattr(arrays, name) for arrays in self.ahead)
            np.testing.assert_array_equal(got, wanted, err_msg=name)

    def same_wave(self, n_reads):
        want, got = self.reference, self.native
        self.same_reads(n_reads)
        assert (got.first, got.end, got.n_experts) == (want.first, want.end, len(want.experts))
        assert self.step.entries[want.first : want.end].tolist() == want.entries
        kinds = got.step_copies["kind"].tolist()
        assert kinds == sorted(kinds), "demotions stand first"

    def same_state(self):
        for tier in (Tier.DEVICE, Tier.RAM):
            a, b = (residency.slots(tier) for residency in self.residencies)
            np.testing.assert_array_equal(a, b)
        for name in self.residencies[0].counters.__slots__:
            a, b = (getattr(residency.counters, name) for residency in self.residencies)
            np.testing.assert_array_equal(a, b, err_msg=name)
        for a, b in zip(*self.segments, strict=True):
            for name in ("slot_of", "holder", "generation", "free_count", "users", "reading",
                         "holds", "tickets", "ahead", "ticket"):  # fmt: skip
                got, wanted = getattr(a, name), getattr(b, name)
                np.testing.assert_array_equal(got, wanted, err_msg=name)
            for first, count in zip(a.class_first, a.free_count, strict=True):
                stacks = [s.free_slots[first : first + count].tolist() for s in (a, b)]
                assert stacks[0] == stacks[1]
        self.residencies[0].check_integrity()


@pytest.mark.parametrize("ram", ["exclusive", "inclusive"])
@pytest.mark.parametrize("policy", [LRU, LFRU])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_long_histories(ram, policy, seed):
    rng = np.random.default_rng(seed)
    twins = Twins(rng, policy(), ram)
    for _ in range(25):
        tokens = 1 if rng.random() < 0.7 else int(rng.integers(1, MAX_TOKENS + 1))
        layer = int(rng.integers(twins.topology.n_layers))
        if rng.random() < 0.3:
            twins.look_ahead(layer, 1)
        twins.run(layer, tokens)
        if rng.random() < 0.1:
            twins.read_later(layer)
        if rng.random() < 0.1:
            twins.forget()
        if rng.random() < 0.1:
            twins.disturb()
        twins.some_end()
        twins.same_state()
