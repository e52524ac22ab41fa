"""Contracts on the whole engine: what they read is counted by cause, tiers change nothing."""

import pytest
from support.local_engine import local_engine, slot_bytes
from support.local_model import finished, greedy

from fomoe.config import RoutingConfig
from fomoe.engine.requests import TokenEvent
from fomoe.storage.fetch import PREFETCH, Fetch

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


def test_what_is_given_up_late_is_not_the_next_requests(path, prompt):
    """Storage's word that it dropped a guess may come when its request has ended."""
    total, _ = slot_bytes(path)
    with local_engine(path, vram=total, ram=0) as engine:
        driver, storage = (engine.handles[name].actor for name in ("driver", "storage-0"))
        list(engine.client.stream(greedy(prompt, 2)))
        counters, before = driver._hands.host.counters, driver.status().counters
        counted = counters.nvme_bytes
        guess = Fetch(slot=0, address=0, generation=1 << 40, layer=1, expert=2, priority=PREFETCH)
        storage._report_dropped((guess,))
        receipt = finished(list(engine.client.stream(greedy(prompt, 2)))).receipt
        assert counters.nvme_bytes < counted
        assert receipt.nvme_bytes == 0
        assert set(receipt.bytes_by_cause.values()) == {0}
        after = driver.status().counters
    read = [name for name in before if name.endswith("_total") or "_total{" in name]
    assert all(after[name] >= before[name] for name in read)
    assert len(read) > 20


def test_only_a_lossy_request_is_followed(path, prompt):
    total, _ = slot_bytes(path)
    with local_engine(path, vram=total // 3, ram=0) as engine:
        experts = engine.handles["driver"].actor._hands.host
        ends = (
            lambda: list(engine.client.stream(greedy(prompt, 2, quality="exact"))),
            lambda: engine.client.logits(prompt, 300),
        )
        for end in ends:
            list(engine.client.stream(greedy(prompt, 2, quality="price=0.1")))
            assert experts.residency._followed is not None
            end()
            assert experts.residency._followed is None


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
