"""The executor of copies under everything that streams, storage and the planner may do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.streams import ActorMachine

from fomoe.residency import LFRU, LRU

seeds = st.integers(0, 2**32 - 1)


def machine(seed, ram, **options):
    policy = [LRU, LFRU][seed % 2]()
    return ActorMachine(np.random.default_rng(seed), policy, ram, **options)


def decode(m):
    """One token goes through all layers."""
    for layer in range(m.topology.n_layers):
        m.decode(layer)


@pytest.mark.parametrize("ram", ["exclusive", "inclusive"])
@given(seed=seeds, staging=st.integers(2, 24))
@settings(max_examples=40, deadline=None)
def test_each_expert_finds_its_own_bytes(ram, seed, staging):
    m = machine(seed, ram, staging=staging)
    m.fill()
    for _ in range(6):
        decode(m)
    m.come_to_rest()


@pytest.mark.parametrize("ram", ["exclusive", "inclusive"])
@given(seed=seeds, staging=st.integers(2, 24))
@settings(max_examples=40, deadline=None)
def test_reads_that_fail(ram, seed, staging):
    m = machine(seed, ram, staging=staging, fails=0.1)
    for _ in range(6):
        decode(m)
    m.come_to_rest()


@pytest.mark.parametrize("ram", ["exclusive", "inclusive"])
@given(seed=seeds, staging=st.integers(2, 24))
@settings(max_examples=20, deadline=None)
def test_prompts_between_answers(ram, seed, staging):
    m = machine(seed, ram, staging=staging)
    m.fill()
    for _ in range(3):
        m.prompt(int(m.rng.integers(2, 20)))
        decode(m)
    m.come_to_rest()
