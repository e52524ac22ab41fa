"""Offline scores: a trace by hand, and the traces on which the RAM rule was decided."""

import numpy as np
import pytest

from fomoe.residency import LFRU, LRU
from fomoe.sim.tiers import TierSetup, replay_tiers
from fomoe.traces import synthetic_ids


def setup(device, ram, policy=None, rule="exclusive", n_experts=512):
    return TierSetup(
        n_experts=n_experts,
        device_slots=device,
        ram_slots=ram,
        policy=policy or LRU(),
        ram=rule,
    )


def test_a_trace_by_hand():
    ids = np.array([[[1]], [[2]], [[1]], [[1]], [[3]]], dtype=np.int32)
    score = replay_tiers(ids, setup(1, 1, n_experts=4))
    assert (score.device, score.ram, score.nvme) == (1 / 5, 1 / 5, 3 / 5)
    assert score.demoted == 3 / 5
    assert score.link == pytest.approx(7 / 5)
    score = replay_tiers(ids, setup(1, 2, rule="inclusive", n_experts=4), warmup=2)
    assert (score.device, score.ram, score.nvme) == (1 / 3, 1 / 3, 1 / 3)
    assert score.demoted == 0


@pytest.fixture(scope="module")
def trace():
    return synthetic_ids(500, 2, seed=0)


def test_the_synthetic_trace_is_one(trace):
    assert trace.shape == (500, 2, 10)
    assert trace.dtype == np.int32
    ordered = np.sort(trace, axis=2)
    assert (ordered[..., 1:] > ordered[..., :-1]).all()
    np.testing.assert_array_equal(trace[:5], synthetic_ids(5, 2, seed=0))
    assert not np.array_equal(trace[:5], synthetic_ids(5, 2, seed=1))


@pytest.mark.parametrize(("slots", "measured"), [(50, 0.60), (86, 0.72), (128, 0.81)])
def test_its_hit_rates_resemble_measured_ones(trace, slots, measured):
    assert replay_tiers(trace, setup(slots, 0), warmup=200).device == pytest.approx(
        measured, abs=0.03
    )


@pytest.mark.parametrize("policy", [LRU(), LFRU()])
def test_an_exclusive_ram_tier_saves_reads_and_pays_in_demotions(trace, policy):
    exclusive = replay_tiers(trace, setup(50, 36, policy), warmup=200)
    inclusive = replay_tiers(trace, setup(50, 36, policy, "inclusive"), warmup=200)
    assert exclusive.nvme < 0.85 * inclusive.nvme
    assert exclusive.device == inclusive.device
    missed = 1 - exclusive.device
    assert 0.9 * missed < exclusive.demoted < missed + 1e-9
    assert inclusive.demoted == 0
    for score in (exclusive, inclusive):
        assert score.device + score.ram + score.nvme == pytest.approx(1)


def test_exclusive_tiers_hit_like_one_cache_of_their_sum(trace):
    split = replay_tiers(trace, setup(50, 36), warmup=200)
    whole = replay_tiers(trace, setup(86, 0), warmup=200)
    # Ties inside a step may fall differently.
    assert split.nvme == pytest.approx(whole.nvme, abs=0.005)
