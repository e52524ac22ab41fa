"""Experts on GPUs: whatever comes when, each finds its own bytes, and nothing is lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.simulated_machine import MAX_TOKENS, Machine, gpu_segments

from fomoe.engine.copies import CopyKind
from fomoe.engine.gpu_sweep import order_guess, order_wave
from fomoe.residency import LFRU, LRU, ChunkUse, Residency, Sweep, Topology, guess_ahead
from fomoe.types import ExpertKey

POLICIES = {"lru": LRU, "lfru": LFRU}
seeds = st.integers(0, 2**32 - 1)


def machine(seed, ram, **options):
    rng = np.random.default_rng(seed)
    return Machine(rng, POLICIES[["lru", "lfru"][seed % 2]](), ram, **options)


@pytest.mark.parametrize("ram", ["exclusive", "inclusive"])
@given(seed=seeds, staging=st.integers(2, 24), arm=st.booleans())
@settings(max_examples=60, deadline=None)
def test_decode_steps(ram, seed, staging, arm):
    m = machine(seed, ram, staging=staging, arm=arm)
    for _ in range(6):
        for layer in range(m.topology.n_layers):
            tokens = 1 if m.rng.random() < 0.7 else int(m.rng.integers(1, MAX_TOKENS + 1))
            m.decode(layer, tokens)
    m.come_to_rest()


@pytest.mark.parametrize("ram", ["exclusive", "inclusive"])
@given(seed=seeds, staging=st.integers(2, 24), arm=st.booleans())
@settings(max_examples=60, deadline=None)
def test_failed_reads(ram, seed, staging, arm):
    m = machine(seed, ram, staging=staging, arm=arm, fails=0.1)
    for _ in range(6):
        for layer in range(m.topology.n_layers):
            m.decode(layer)
    m.come_to_rest()


@pytest.mark.parametrize("ram", ["exclusive", "inclusive"])
@given(seed=seeds, staging=st.integers(2, 24), fails=st.sampled_from([0.0, 0.05]))
@settings(max_examples=30, deadline=None)
def test_prompts_between_answers(ram, seed, staging, fails):
    m = machine(seed, ram, staging=staging, fails=fails)
    m.fill()
    for _ in range(3):
        m.prompt(int(m.rng.integers(2, 20)))
        for layer in range(m.topology.n_layers):
            m.decode(layer)
    m.come_to_rest()


def tiers_with_an_arm(seed, ram, staging, timing):
    """Where every expert is after each step, all of it answered before the next, and prompts."""
    m = machine(seed, ram, staging=staging, arm=True)
    m.fill()
    told, text, shape = [], np.random.default_rng(seed + 1), m.popularity.shape[1]
    m.scores = lambda layer, tokens: (
        m.popularity[layer] + text.normal(size=(tokens, shape))
    ).astype(np.float32)
    m.guess_at = lambda sweep, layer: None  # prompts on GPUs guess nothing
    m.rng = world = np.random.default_rng(timing)
    m.guess = lambda layer: m.send_ahead(
        layer, m.planner.look_ahead(layer, world.normal(size=(1, shape)).astype(np.float32))
    )
    for token in range(8):
        if token % 4 == 0:
            m.prompt(12)
        for layer in range(m.topology.n_layers):
            for device in list(m.open):
                m.finish(device)
            m.hear()
            m.decode(layer)
            stays = (m.step.entries["slot"][: m.top_k] < 0).tolist()
            told.append((stays, [m.residency.tier_of(i).tolist() for i in range(len(m.device))]))
    m.come_to_rest()
    return told


@pytest.mark.parametrize("ram", ["exclusive", "inclusive"])
@given(seed=seeds, staging=st.integers(2, 24))
@settings(max_examples=12, deadline=None)
def test_who_computes_does_not_depend_on_when_anything_comes(ram, seed, staging):
    first, second = (tiers_with_an_arm(seed, ram, staging, timing) for timing in (1, 2))
    assert first == second


def test_what_a_sweep_drops_on_its_way_is_cancelled():
    topology = Topology(
        n_layers=1, n_experts=6, layer_device=np.zeros(1, np.int32), device_node=(0,),
        layer_class=np.zeros(1, np.int32), device_slots={(0, 0): 2}, ram_slots={},
    )  # fmt: skip
    residency, (segment,) = Residency(topology, LRU()), gpu_segments(topology, 8)
    expected = np.array([1, 1, 0, 0, 0, 0], bool)
    guess = guess_ahead(residency, 0, expected, 4, segment.guess_room(0, residency))
    reads, loads = order_guess(segment, residency, guess)
    assert [read.expert for read in reads] == [ExpertKey(0, 0), ExpertKey(0, 1)]
    use = ChunkUse(4, np.array([4, 5], np.int32), np.array([2, 2]), np.array([2, 3]))
    sweep = Sweep(residency, 0, use, borrows=True)
    orders = order_wave(segment, residency, sweep, sweep.next_wave(16, 8))
    cancels = orders.copies[orders.copies["kind"] == CopyKind.CANCEL]
    named = ["slot", "generation", "expert"]
    assert sorted(cancels[named].tolist()) == sorted(loads[named].tolist())
    assert not (segment.slot_of[0, :2] >= 0).any()
    assert segment.users.sum() == 2 + len(orders.entries), "until the device has answered"
