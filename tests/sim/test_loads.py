import numpy as np
import pytest

from fomoe.errors import ConfigError
from fomoe.residency import LRU
from fomoe.routing import CacheAwareRouting
from fomoe.sim.loads import (
    Cache,
    Replay,
    assumed_loads,
    exact_ids,
    replay_ids,
    replay_loads,
    scores_of_rows,
    spread_layers,
    synthetic_scores,
)

TOKENS, LAYERS, EXPERTS, K = 220, 4, 512, 10
REPLAY = Replay(top_k=K, warmup=150, devices=1, layers=LAYERS)


@pytest.fixture(scope="module")
def scores():
    return synthetic_scores(TOKENS, LAYERS, EXPERTS, seed=1)


@pytest.mark.parametrize(("slots", "measured"), [(50, 0.60), (86, 0.72), (128, 0.81)])
def test_the_synthetic_text_has_the_measured_locality(scores, slots, measured):
    cache = Cache(device_slots=slots, ram_slots=0, policy=LRU())
    loads = replay_ids(exact_ids(scores, K), EXPERTS, cache, REPLAY)
    assert loads.shares[0] == pytest.approx(measured, abs=0.03)


def test_every_activation_is_counted_once_and_has_one_owner(scores):
    cache = Cache(device_slots=50, ram_slots=36)
    one = replay_ids(exact_ids(scores, K), EXPERTS, cache, REPLAY)
    for owners in (1, 2, 3):
        replay = Replay(top_k=K, warmup=150, devices=owners, layers=LAYERS)
        loads = replay_ids(exact_ids(scores, K), EXPERTS, cache, replay)
        total = loads.device + loads.ram + loads.nvme
        assert (total.sum(axis=2) == K).all()
        for part in ("device", "ram", "nvme", "demoted"):
            np.testing.assert_array_equal(
                getattr(loads, part).sum(axis=2), getattr(one, part).sum(axis=2)
            )
    # In a full exclusive pair of tiers, what comes to the device is what goes back to RAM.
    came = int(one.ram.sum() + one.nvme.sum())
    assert one.demoted.sum() == pytest.approx(came, rel=0.02)


def test_a_rule_that_never_substitutes_asks_for_the_exact_experts(scores):
    cache = Cache(device_slots=40, ram_slots=20)
    ids = replay_ids(exact_ids(scores, K), EXPERTS, cache, REPLAY)
    routed = replay_loads(scores, cache, CacheAwareRouting(1.01), REPLAY)
    for part in ("device", "ram", "nvme", "demoted"):
        np.testing.assert_array_equal(getattr(ids, part), getattr(routed, part))
    assert routed.substituted == 0


def test_cache_aware_routing_substitutes_instead_of_reading(scores):
    cache = Cache(device_slots=50, ram_slots=36)
    exact = replay_loads(scores, cache, CacheAwareRouting(1.01), REPLAY)
    car = replay_loads(scores, cache, CacheAwareRouting(0.35), REPLAY)
    assert car.shares[2] < 0.35 * exact.shares[2]
    assert car.substituted > 0.2
    assert 0 < car.substitutes_in_ram < 0.5


def test_few_layers_stand_for_many(scores):
    part = np.arange(2 * 3 * 1, dtype=np.int16).reshape(2, 3, 1)
    spread = spread_layers(part, 6)
    np.testing.assert_array_equal(spread[:, :3], part)
    np.testing.assert_array_equal(spread[:, 3:], part[::-1])
    assert spread_layers(part, 4).shape == (2, 4, 1)


def test_assumed_shares_come_out(scores):
    loads = assumed_loads((0.6, 0.12, 0.28), K, 60, 200, seed=0)
    assert loads.shares == pytest.approx((0.6, 0.12, 0.28), abs=0.005)
    assert ((loads.device + loads.ram + loads.nvme) == K).all()


def test_refuses_slots_for_less_than_a_layer(scores):
    with pytest.raises(ConfigError, match="hold less"):
        replay_ids(exact_ids(scores, K), EXPERTS, Cache(device_slots=2, ram_slots=0), REPLAY)


def test_a_recorded_row_keeps_its_order(scores):
    ids = np.argsort(-scores, axis=2)[:, :, :64].astype(np.uint16)
    powers = np.exp(np.take_along_axis(scores, ids.astype(int), axis=2))
    shares = (powers / np.exp(scores).sum(axis=2, keepdims=True)).astype(np.float16)
    again = scores_of_rows(ids, shares, EXPERTS)
    np.testing.assert_array_equal(exact_ids(again, K), np.sort(ids[:, :, :K]))
    assert (np.argsort(-again, axis=2)[:, :, :64] == ids).mean() > 0.999
