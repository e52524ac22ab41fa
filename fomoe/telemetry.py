"""Counters, gauges and timed spans; adds numbers up in memory and does no I/O.

`METRICS` is the one table of names: `/metrics`, Ray's metrics port, the Grafana dashboard and the
alert rules take theirs from it. A *series* is a metric with its labels filled in, written as
Prometheus writes it: `fomoe_expert_lookups_total{tier="ram"}`. Every series exists from the start
with the value 0, so a rate over it is right from the first increment.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

_SERIES_PATTERN = re.compile(r'(\w+)(?:\{(\w+)="(\w+)"\})?')
_TIERS = ("device", "ram", "nvme")
_CAUSES = ("demand", "prompt", "prefetch", "background", "shadow")
_PARTS = ("dense", "experts", "brain", "channel", "disk", "rest")


@dataclass(frozen=True, slots=True)
class Metric:
    """One name that fomoe exports.

    Attributes:
        name: Begins with `fomoe_`; a counter ends with `_total`.
        kind: A counter only grows; a gauge goes both ways.
        unit: Base unit of the value: `tokens`, `bytes`, `seconds` ...
        help: One line for people.
        label: Name of its label; empty when it has none.
        label_values: All values that the label takes.
    """

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    help: str
    label: str = ""
    label_values: tuple[str, ...] = ()

    def series(self) -> tuple[str, ...]:
        """Return the series of this metric, one per label value."""
        if not self.label:
            return (self.name,)
        return tuple(f'{self.name}{{{self.label}="{value}"}}' for value in self.label_values)


METRICS: tuple[Metric, ...] = (
    Metric("fomoe_prompt_tokens_total", "counter", "tokens", "Prompt tokens processed."),
    Metric(
        "fomoe_prompt_cached_tokens_total",
        "counter",
        "tokens",
        "Prompt tokens whose state was still there from an earlier request.",
    ),
    Metric("fomoe_prompt_seconds_total", "counter", "seconds", "Time spent on prompts."),
    Metric("fomoe_generated_tokens_total", "counter", "tokens", "Tokens generated."),
    Metric("fomoe_generated_seconds_total", "counter", "seconds", "Time spent generating tokens."),
    Metric(
        "fomoe_prompt_part_seconds_total",
        "counter",
        "seconds",
        "Where the time of prompts went.",
        "part",
        _PARTS,
    ),
    Metric(
        "fomoe_token_part_seconds_total",
        "counter",
        "seconds",
        "Where the time of generated tokens went; the parts add up to the wall time.",
        "part",
        _PARTS,
    ),
    Metric("fomoe_tokens_per_second", "gauge", "tokens/s", "Speed of the answer in progress."),
    Metric(
        "fomoe_requests_total",
        "counter",
        "requests",
        "Requests that ended, by how they ended.",
        "reason",
        ("stop", "length", "cancelled", "error"),
    ),
    Metric("fomoe_requests_running", "gauge", "requests", "Requests being processed."),
    Metric("fomoe_requests_queued", "gauge", "requests", "Requests waiting for their turn."),
    Metric(
        "fomoe_expert_lookups_total",
        "counter",
        "activations",
        "Expert activations of generated tokens, by the tier that held the expert.",
        "tier",
        _TIERS,
    ),
    Metric(
        "fomoe_prompt_expert_lookups_total",
        "counter",
        "activations",
        "Expert activations of prompt tokens, by the tier that held the expert.",
        "tier",
        _TIERS,
    ),
    Metric(
        "fomoe_expert_share",
        "gauge",
        "ratio",
        "Outcomes of the expert activations of the answer in progress, or of the last one.",
        "outcome",
        (*_TIERS, "substituted"),
    ),
    Metric(
        "fomoe_substitutions_total",
        "counter",
        "activations",
        "Expert activations that lossy routing gave to another expert.",
    ),
    Metric(
        "fomoe_substitutes_total",
        "counter",
        "activations",
        "Experts that ran in another's place, by the tier that held them.",
        "tier",
        _TIERS,
    ),
    Metric(
        "fomoe_router_mass_lost_total",
        "counter",
        "probability",
        "Router weight lost to substitutions, summed over layers and tokens.",
    ),
    Metric(
        "fomoe_logical_bytes_total",
        "counter",
        "bytes",
        "Expert bytes that lossy routing's budgets count: asked for and not logically resident.",
    ),
    Metric(
        "fomoe_shadow_steps_total",
        "counter",
        "tokens",
        "Generated tokens that were also computed exactly.",
    ),
    Metric(
        "fomoe_shadow_kl_nats_total",
        "counter",
        "nats",
        "KL divergence of lossy from exact tokens, summed over shadow steps.",
    ),
    Metric(
        "fomoe_estimated_kl",
        "gauge",
        "nats/token",
        "Mean loss that shadow steps measured in the answer in progress, or in the last one.",
    ),
    Metric(
        "fomoe_quality_price",
        "gauge",
        "ratio",
        "Price of a read at the last generated token, as a share of its router mass.",
    ),
    Metric(
        "fomoe_expert_cause_bytes_total",
        "counter",
        "bytes",
        "Expert bytes read from the files, by why they were read.",
        "cause",
        _CAUSES,
    ),
    Metric(
        "fomoe_expert_bytes_read_total", "counter", "bytes", "Expert bytes read from the files."
    ),
    Metric(
        "fomoe_expert_bytes_copied_total",
        "counter",
        "bytes",
        "Expert bytes moved from the RAM tier to a device.",
    ),
    Metric(
        "fomoe_experts_computed_in_ram_total",
        "counter",
        "experts",
        "Experts of generated tokens that the processor computed in RAM beside GPUs.",
    ),
    Metric(
        "fomoe_expert_stall_seconds_total",
        "counter",
        "seconds",
        "Time in which computing waited for experts.",
    ),
    Metric(
        "fomoe_expert_evictions_total",
        "counter",
        "experts",
        "Experts that lost their place, by the tier that they left.",
        "tier",
        ("device", "ram"),
    ),
    Metric(
        "fomoe_expert_demotions_total",
        "counter",
        "experts",
        "Experts moved from a device back to the RAM tier.",
    ),
    Metric(
        "fomoe_expert_demoted_bytes_total",
        "counter",
        "bytes",
        "Expert bytes moved from a device back to the RAM tier.",
    ),
    Metric("fomoe_prefetch_issued_total", "counter", "experts", "Experts fetched ahead of need."),
    Metric("fomoe_prefetch_used_total", "counter", "experts", "Prefetched experts that were used."),
    Metric(
        "fomoe_prefetch_wasted_total",
        "counter",
        "experts",
        "Prefetched experts that were evicted or superseded before any use.",
    ),
    Metric(
        "fomoe_decode_prefetches_total",
        "counter",
        "experts",
        "Experts asked for before a generated token's router spoke: all, wanted, never read.",
        "outcome",
        ("asked", "used", "dropped"),
    ),
    Metric(
        "fomoe_tier_bytes",
        "gauge",
        "bytes",
        "Bytes of experts that a tier holds, over all devices and nodes.",
        "tier",
        ("device", "ram"),
    ),
    Metric(
        "fomoe_tier_capacity_bytes",
        "gauge",
        "bytes",
        "Bytes of expert slots that a tier has, over all devices and nodes.",
        "tier",
        ("device", "ram"),
    ),
    Metric("fomoe_read_retries_total", "counter", "reads", "File reads that were tried again."),
    Metric("fomoe_read_errors_total", "counter", "reads", "File reads that failed for good."),
    Metric(
        "fomoe_actor_restarts_total",
        "counter",
        "restarts",
        "Actors that died and were started again.",
        "actor",
        ("driver", "gpu", "storage"),
    ),
    Metric("fomoe_ready", "gauge", "boolean", "1 while requests are answered, else 0."),
    Metric("fomoe_load_progress", "gauge", "ratio", "Part of the model that is loaded, 0 to 1."),
)

_METRIC_OF_SERIES: Mapping[str, Metric] = {
    series: metric for metric in METRICS for series in metric.series()
}


def samples(snapshot: Mapping[str, float]) -> Iterator[tuple[Metric, dict[str, str], float]]:
    """Yield (metric, labels, value) for each series of a snapshot, for an exporter.

    Series that are missing from the snapshot are left out.

    Raises:
        KeyError: the snapshot names a series that `METRICS` does not have.
    """
    for series, value in snapshot.items():
        match = _SERIES_PATTERN.fullmatch(series)
        labels = {match[2]: match[3]} if match and match[2] else {}
        yield _METRIC_OF_SERIES[series], labels, value


class Growing:
    """Keeps the counters of successive snapshots from falling, which a scraper takes for a restart.

    A read is counted when it is asked for and taken back where storage gives it up: such a counter
    stays where it was until it has caught up.
    """

    def __init__(self) -> None:
        self._highest: dict[str, float] = {}

    def of(self, snapshot: Mapping[str, float]) -> dict[str, float]:
        """Return a snapshot with no counter below what it was in an earlier one.

        Raises:
            KeyError: the snapshot names a series that `METRICS` does not have.
        """
        counters = {
            series: max(value, self._highest.get(series, value))
            for series, value in snapshot.items()
            if _METRIC_OF_SERIES[series].kind == "counter"
        }
        self._highest |= counters
        return {**snapshot, **counters}


class Telemetry:
    """The numbers of one process; one thread writes, any thread may take a snapshot.

    Adding to a series replaces a float in a dictionary that never grows, so the layer loop may
    call it without allocating anything that stays.
    """

    def __init__(self) -> None:
        self._values = dict.fromkeys(
            itertools.chain.from_iterable(metric.series() for metric in METRICS), 0.0
        )

    def add(self, series: str, amount: float = 1.0) -> None:
        """Add a non-negative amount to a counter.

        Raises:
            KeyError: `METRICS` has no such series.
        """
        self._values[series] += amount

    def set(self, series: str, value: float) -> None:
        """Set a gauge.

        Raises:
            KeyError: `METRICS` has no such series.
        """
        if series not in self._values:
            raise KeyError(series)
        self._values[series] = value

    @contextmanager
    def span(self, series: str) -> Iterator[None]:
        """Add the seconds that the body takes to a counter, also when the body raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._values[series] += time.perf_counter() - start

    def snapshot(self) -> dict[str, float]:
        """Return a copy of all series."""
        return dict(self._values)
