"""Contracts on the whole engine: what they read is counted by cause, tiers change nothing."""

import pytest
from support.local_engine import local_engine, slot_bytes
from support.local_model import finished, greedy

from fomoe.config import RoutingConfig
from fomoe.engine.requests import TokenEvent

CAPACITY, TOKENS = 6, 40


def run(path, prompt, quality, every, *, vram=0.3, delay=None, devices=1, **options):
    total, _ = slot_bytes(path)
    routing = RoutingConfig(car_capacity=CAPACITY, shadow_every=every)
    with local_engine(
        path, devices=("cpu",) * devices, vram=int(total * vram) // devices, ram=0,
        routing=routing, delay=delay, **options,
    ) as engine:  # fmt: skip
        request = greedy(prompt, TOKENS, quality=quality, logprobs=8)
        events = list(engine.client.stream(request))
        series = engine.handles["driver"].call("stats").result(5.0)
    return [e for e in events if isinstance(e, TokenEvent)], finished(events).receipt, series


@pytest.fixture(scope="module")
def path(model_paths):
    return model_paths["mixed"]


def test_shadow_bytes_are_counted_and_nothing_else_changes(path, prompt):
    want, plain, _ = run(path, prompt, "price=0.2", 0)
    got, watched, series = run(path, prompt, "price=0.2", 4)
    assert got == want
    assert (watched.decision_hash, watched.substituted, watched.lost_mass) == (
        plain.decision_hash, plain.substituted, plain.lost_mass,
    )  # fmt: skip
    assert plain.substituted > 20
    assert plain.bytes_by_cause["shadow"] == 0
    assert watched.bytes_by_cause["shadow"] > 0
    assert watched.shadow_steps == 10
    assert watched.logical_bytes > plain.logical_bytes
    for receipt in (plain, watched):
        causes = receipt.bytes_by_cause
        assert min(causes.values()) >= 0
        assert sum(causes.values()) == receipt.nvme_bytes
        assert causes["prompt"] > 0
        # A shadow's activations are none of the answer's.
        decode = receipt.hits_device + receipt.hits_ram + receipt.reads_nvme + receipt.substituted
        assert decode == 4 * 3 * (TOKENS - 1)
    for cause, n_bytes in watched.bytes_by_cause.items():
        assert series[f'fomoe_expert_cause_bytes_total{{cause="{cause}"}}'] == n_bytes
    assert series["fomoe_shadow_steps_total"] == 10
    assert series["fomoe_estimated_kl"] == pytest.approx(watched.estimated_kl)
    assert series["fomoe_quality_price"] == 0.2
    shares = [v for k, v in series.items() if k.startswith("fomoe_expert_share")]
    assert sum(shares) == pytest.approx(1.0)


@pytest.mark.parametrize("quality", ["kl=0.01", "bytes=60KB/token"])
def test_a_contract_does_not_feel_the_machine(path, prompt, quality, delays, local_models):
    model = local_models["mixed"]
    sequence = model.sequence(capacity=CAPACITY)
    model.routing = RoutingConfig(shadow_every=8)
    want = model.run(greedy(prompt, TOKENS, quality=quality, logprobs=8), sequence)
    model.routing = RoutingConfig(shadow_every=0)
    expected = finished(want).receipt
    machines = (
        {"vram": 0.3, "delay": delays(5)},
        {"vram": 0.4, "devices": 2, "delay": delays(6)},
        {"vram": 0.3, "overlap": False},
        {"vram": 1.0},
    )
    for machine in machines:
        got, receipt, _ = run(path, prompt, quality, 8, **machine)
        assert got == [e for e in want if isinstance(e, TokenEvent)]
        for name in ("decision_hash", "price", "shadow_kl", "shadow_steps", "logical_bytes"):
            assert getattr(receipt, name) == getattr(expected, name), name
    assert expected.substituted > 0
