"""Receipts are differences of running totals; series are the totals themselves."""

from dataclasses import fields

import pytest

from fomoe.config import Budgets, EngineConfig
from fomoe.engine import meter as meter_module
from fomoe.engine.fill import fill_order
from fomoe.engine.meter import HostCounters, LossCounters, Meter
from fomoe.engine.plan import make_plan
from fomoe.engine.series import TierBytes, engine_series, tier_bytes
from fomoe.engine.waterfall import PARTS, Lap, Stopwatch
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.quality import Quality
from fomoe.residency import LRU, Counters, Residency
from fomoe.telemetry import METRICS, samples
from fomoe.types import Tier

BY_RECEIPT_FIELD = {
    "hits_device": 3, "hits_ram": 5, "reads_nvme": 7, "prompt_hits_device": 11,
    "prompt_hits_ram": 13, "prompt_reads_nvme": 17, "nvme_bytes": 19, "ram_bytes": 23,
    "demoted_bytes": 29, "computed_in_ram": 31,
}  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """The meter's clock, moved by hand."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(meter_module, "time", clock)
    return clock


@pytest.fixture
def totals():
    return HostCounters(), LossCounters()


@pytest.fixture
def meter(clock, totals):
    return Meter(*totals, Stopwatch(), devices="device (emulated)", capacity=9)


def test_a_receipt_counts_from_the_start_of_its_request(meter, totals):
    host, loss = totals
    for name in BY_RECEIPT_FIELD:
        setattr(host, name, 1000)
    host.stall_s, loss.substituted, loss.lost_mass = 50.0, 400, 12.5
    meter.start(Quality(), cached=0)
    for name, value in BY_RECEIPT_FIELD.items():
        setattr(host, name, 1000 + value)
    host.stall_s, loss.substituted, loss.lost_mass = 50.25, 431, 12.75
    receipt = meter.receipt(0)
    assert {name: getattr(receipt, name) for name in BY_RECEIPT_FIELD} == BY_RECEIPT_FIELD
    assert (receipt.stall_ms, receipt.substituted, receipt.lost_mass) == (250.0, 31, 0.25)
    meter.start(Quality(), cached=0)
    assert meter.receipt(0).nvme_bytes == 0


def test_every_total_of_the_host_is_copied():
    host = HostCounters(*range(1, 1 + len(fields(HostCounters))))
    copy = host.copy()
    assert copy == host
    host.hits_ram += 1
    assert copy != host


def test_a_shadow_steps_reads_are_its_own(meter, totals):
    host, loss = totals
    host.hits_device, host.reads_nvme = 5, 6
    host.nvme_bytes, host.prefetch_bytes, host.background_bytes = 100, 20, 30
    meter.start(Quality("kl", 0.01), cached=0)
    with meter.shadow():
        host.hits_device, host.hits_ram, host.reads_nvme, host.computed_in_ram = 7, 1, 9, 3
        host.nvme_bytes += 40 - 10 - 5  # given up meanwhile: a prefetch and a background read
        host.prefetch_bytes -= 10
        host.background_bytes -= 5
    meter.shadowed(3_000_000)
    meter.shadowed(1_000_000)
    meter.stepped(0.25, 70)
    receipt = meter.receipt(0)
    assert (receipt.hits_device, receipt.hits_ram, receipt.reads_nvme) == (0, 0, 0)
    assert receipt.computed_in_ram == 0
    assert receipt.bytes_by_cause == {
        "demand": 0, "prompt": 0, "prefetch": -10, "background": -5, "shadow": 40,
    }  # fmt: skip
    assert (receipt.shadow_steps, receipt.logical_bytes, receipt.price) == (2, 70, 0.25)
    assert receipt.estimated_kl == pytest.approx(0.002)
    assert (meter.estimated_kl(), loss.shadow_steps) == (pytest.approx(0.002), 2)
    meter.start(Quality(), cached=0)
    assert (meter.estimated_kl(), meter.receipt(0).estimated_kl) == (0.0, None)


def test_a_shadow_step_takes_nothing_from_the_prompt_and_uses_no_guess(meter, totals):
    host, _ = totals
    host.nvme_bytes = host.prompt_bytes = 100
    meter.start(Quality("kl", 0.01), cached=0)
    with meter.shadow():
        host.nvme_bytes += 40 - 10  # a read ahead of the prompt is given up meanwhile
        host.prompt_bytes -= 10
        host.prefetched_used += 1  # a guess of the step itself, which did not want it
    receipt = meter.receipt(0)
    assert receipt.bytes_by_cause == {
        "demand": 0, "prompt": -10, "prefetch": 0, "background": 0, "shadow": 40,
    }  # fmt: skip
    assert receipt.prefetched_used == 0


def test_a_shadow_step_that_fails_is_charged_all_the_same(meter, totals):
    host, _ = totals

    def fail():
        with meter.shadow():
            host.hits_device += 3
            host.nvme_bytes += 40
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (host.hits_device, host.shadow_bytes) == (0, 40)


def test_shares_are_of_the_present_request(meter, totals):
    host, loss = totals
    host.hits_device = 50
    meter.start(Quality("kl", 0.01), cached=0)
    assert sum(meter.shares().values()) == 0.0
    host.hits_device, host.hits_ram, host.reads_nvme, loss.substituted = 54, 3, 2, 1
    assert meter.shares() == {"device": 0.4, "ram": 0.3, "nvme": 0.2, "substituted": 0.1}


def test_times_of_prompt_and_answer(meter, clock):
    meter.start(Quality(), cached=4)
    clock.now += 2.0
    meter.prompt_done(24)
    for pause in (0.0, 0.5, 0.5):
        clock.now += pause
        meter.token()
    assert meter.rate() == pytest.approx(2.0)  # two tokens after the first, in one second
    clock.now += 0.25
    receipt = meter.receipt(0)
    assert (receipt.prompt_tokens, receipt.cached_tokens, receipt.generated_tokens) == (24, 4, 3)
    assert receipt.prompt_ms == pytest.approx(2000.0)
    assert receipt.generated_ms == pytest.approx(1250.0)
    assert meter.prompt_s == pytest.approx(2.0)
    assert meter.generated_s == pytest.approx(1.0)
    assert (meter.prompt_tokens, meter.cached_tokens, meter.generated_tokens) == (20, 4, 3)


def test_a_request_that_ends_in_its_prompt(meter, clock):
    meter.start(Quality(), cached=0)
    clock.now += 3.0
    receipt = meter.receipt(0)
    assert receipt.prompt_ms == pytest.approx(3000.0)
    assert (receipt.prompt_tokens, receipt.generated_ms) == (0, 0.0)
    assert meter.rate() == 0.0


def test_the_parts_of_a_token_add_up_to_its_time(totals, clock):
    watch = Stopwatch()
    meter = Meter(*totals, watch, devices="device", capacity=9)
    host, _ = totals
    meter.start(Quality(), cached=0)
    clock.now += 1.0
    watch.ns[Lap.DENSE] += int(0.75e9)
    meter.prompt_done(10)
    for _ in range(2):
        clock.now += 0.1
        watch.ns[Lap.DENSE] += int(0.02e9)
        watch.ns[Lap.BRAIN] += int(0.01e9)
        watch.ns[Lap.AWAIT] += int(0.05e9)
        host.compute_s += 0.025
        host.stall_s += 0.015
        meter.token()
    parts = dict(zip(PARTS, meter.token_parts, strict=True))
    wanted = {"dense": 0.02, "experts": 0.025, "brain": 0.01, "channel": 0.01, "disk": 0.015}
    assert parts == pytest.approx(wanted | {"rest": 0.02})
    receipt = meter.receipt(0)
    assert receipt.prompt_parts_ms["dense"] == pytest.approx(750.0)
    assert sum(receipt.prompt_parts_ms.values()) == pytest.approx(receipt.prompt_ms)
    assert sum(receipt.generated_parts_ms.values()) == pytest.approx(receipt.generated_ms)
    assert sum(meter.generated_parts) == pytest.approx(meter.generated_s)


def test_mode_capacity_and_hash(meter):
    meter.start(Quality(), cached=0)
    exact = meter.receipt(0xABC)
    assert (exact.mode, exact.logical_capacity) == ("exact", 0)
    assert exact.decision_hash == "0000000000000abc"
    assert exact.devices == "device (emulated)"
    meter.start(Quality("car", 0.35), cached=0)
    lossy = meter.receipt(2**64 - 1)
    assert (lossy.mode, lossy.logical_capacity) == ("car=0.35", 9)
    assert lossy.decision_hash == "f" * 16


def test_series_have_the_names_that_metrics_declare(meter):
    series = engine_series(meter, Counters.zeros(3), TierBytes(1, 2, 3, 4))
    assert series.keys() <= {name for metric in METRICS for name in metric.series()}
    assert len(list(samples(series))) == len(series)


def test_series_tell_the_three_tiers_apart(meter, totals):
    host, loss = totals
    for name, value in BY_RECEIPT_FIELD.items():
        setattr(host, name, value)
    loss.substituted = 31
    series = engine_series(meter, Counters.zeros(2), TierBytes(37, 41, 43, 47))
    assert series['fomoe_expert_lookups_total{tier="device"}'] == 3
    assert series['fomoe_expert_lookups_total{tier="ram"}'] == 5
    assert series['fomoe_expert_lookups_total{tier="nvme"}'] == 7
    assert series['fomoe_prompt_expert_lookups_total{tier="nvme"}'] == 17
    assert series["fomoe_expert_bytes_read_total"] == 19
    assert series["fomoe_expert_bytes_copied_total"] == 23
    assert series["fomoe_expert_demoted_bytes_total"] == 29
    assert series["fomoe_experts_computed_in_ram_total"] == 31
    assert series["fomoe_substitutions_total"] == 31
    assert series['fomoe_tier_bytes{tier="device"}'] == 37
    assert series['fomoe_tier_bytes{tier="ram"}'] == 41
    assert series['fomoe_tier_capacity_bytes{tier="device"}'] == 43
    assert series['fomoe_tier_capacity_bytes{tier="ram"}'] == 47


def test_tier_bytes_are_those_of_the_experts_in_the_tables(model_path):
    file = open_gguf(model_path)
    spec = read_spec(file)
    table = ExpertTable.from_gguf(file, spec.n_layers)
    whole = sum(table.slot_bytes(i) for i in range(spec.n_layers)) * spec.moe.n_experts
    config = EngineConfig(
        model=model_path, budgets=Budgets(vram_bytes=whole // 5, ram_bytes=whole // 9)
    )
    plan = make_plan(table, spec, config, (0,))
    residency = Residency(plan.topology, LRU())
    empty = tier_bytes(plan, residency)
    assert (empty.device, empty.ram) == (0, 0)
    assert (empty.device_slots, empty.ram_slots) == plan.slot_bytes()
    placed = residency.fill(fill_order(plan.topology))
    full = tier_bytes(plan, residency)
    for tier, got in ((Tier.DEVICE, full.device), (Tier.RAM, full.ram)):
        assert got == sum(table.expert_bytes(p.key.layer) for p in placed if p.tier == tier) > 0
    assert full.device <= full.device_slots
