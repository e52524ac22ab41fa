from __future__ import annotations

import time
import tracemalloc

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fomoe.telemetry import METRICS, Growing, Telemetry, samples


def test_names_follow_the_rules() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.name.startswith("fomoe_")
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith(".")
        assert bool(metric.label) == bool(metric.label_values), metric.name
        if metric.unit in ("bytes", "seconds"):
            assert metric.unit in metric.name, metric.name


def test_a_series_is_written_as_prometheus_writes_it() -> None:
    for metric in METRICS:
        for series in metric.series():
            (family,) = text_string_to_metric_families(f"{series} 1.0\n")
            (sample,) = family.samples
            assert sample.name == metric.name
            assert tuple(sample.labels) == ((metric.label,) if metric.label else ())


def test_every_series_starts_at_zero_and_comes_back_as_a_sample() -> None:
    snapshot = Telemetry().snapshot()
    assert set(snapshot.values()) == {0.0}
    seen = [(metric.name, tuple(labels.values())) for metric, labels, _ in samples(snapshot)]
    wanted = [
        (metric.name, (value,) if metric.label else ())
        for metric in METRICS
        for value in (metric.label_values or ("",))
    ]
    assert seen == wanted


def test_counters_add_and_gauges_are_set() -> None:
    telemetry = Telemetry()
    telemetry.add('fomoe_expert_lookups_total{tier="ram"}', 3)
    telemetry.add('fomoe_expert_lookups_total{tier="ram"}')
    telemetry.set("fomoe_requests_running", 2)
    telemetry.set("fomoe_requests_running", 1)
    snapshot = telemetry.snapshot()
    assert snapshot['fomoe_expert_lookups_total{tier="ram"}'] == 4
    assert snapshot['fomoe_expert_lookups_total{tier="nvme"}'] == 0
    assert snapshot["fomoe_requests_running"] == 1
    telemetry.add("fomoe_generated_tokens_total")
    assert snapshot["fomoe_generated_tokens_total"] == 0


def test_counters_do_not_fall_and_gauges_may() -> None:
    growing, name = Growing(), "fomoe_expert_bytes_read_total"
    seen = [
        growing.of({name: value, "fomoe_requests_running": value}) for value in (3.0, 1.0, 2.0, 5.0)
    ]
    assert [snapshot[name] for snapshot in seen] == [3.0, 3.0, 3.0, 5.0]
    assert [snapshot["fomoe_requests_running"] for snapshot in seen] == [3.0, 1.0, 2.0, 5.0]


def test_unknown_series_are_refused() -> None:
    telemetry = Telemetry()
    with pytest.raises(KeyError, match="fomoe_typo"):
        telemetry.add("fomoe_typo_total")
    with pytest.raises(KeyError, match="fomoe_typo"):
        telemetry.set("fomoe_typo", 1.0)
    with pytest.raises(KeyError, match="vram"):
        list(samples({'fomoe_tier_bytes{tier="vram"}': 1.0}))


def test_a_span_counts_its_time_also_when_it_fails() -> None:
    telemetry = Telemetry()

    def failing() -> None:
        with telemetry.span("fomoe_expert_stall_seconds_total"):
            time.sleep(0.02)
            raise RuntimeError("read failed")

    with pytest.raises(RuntimeError, match="read failed"):
        failing()
    assert 0.02 <= telemetry.snapshot()["fomoe_expert_stall_seconds_total"] < 1.0


def test_counting_keeps_no_memory() -> None:
    telemetry = Telemetry()
    series = 'fomoe_expert_lookups_total{tier="device"}'
    for _ in range(10):
        telemetry.add(series)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(1000):
            telemetry.add(series)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 256
