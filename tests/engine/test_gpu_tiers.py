"""Experts on GPUs: whatever comes when, each finds its own bytes, and nothing is lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.simulated_machine import MAX_TOKENS, Machine

from fomoe.residency import LFRU, LRU

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
