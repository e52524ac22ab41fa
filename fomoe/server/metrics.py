"""What `/metrics` shows: the engine's totals, and what only the HTTP side can measure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from fomoe.engine.requests import Engine, EngineStatus, Receipt, shares
from fomoe.telemetry import METRICS, Metric, Telemetry

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_SERIES = re.compile(r'\w+\{\w+="(\w+)"\}')


class ServerMetrics:
    """The server's own registry; nothing is shared with other servers in the process."""

    def __init__(self, engine: Engine) -> None:
        self._totals = Telemetry()
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, self._totals))
        self._requests = Counter(
            "fomoe_http_requests",
            "HTTP requests that were answered.",
            ["endpoint", "code"],
            registry=self._registry,
        )
        self._cancelled = Counter(
            "fomoe_http_cancelled",
            "Requests whose client went away or that failed, by how far they were.",
            ["stage"],
            registry=self._registry,
        )
        self._first_token = Histogram(
            "fomoe_time_to_first_token_seconds",
            "From a request's arrival at the engine to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._next_token = Histogram(
            "fomoe_inter_token_seconds",
            "Between two tokens of one answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        for stage in ("prompt", "decode"):
            self._cancelled.labels(stage)

    def render(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def responded(self, endpoint: str, code: int) -> None:
        """Count an HTTP response; `endpoint` is a route, never a client's own path."""
        self._requests.labels(endpoint, str(code)).inc()

    def cancelled(self, stage: str) -> None:
        """Count a request that ended before its answers did; stage is prompt or decode."""
        self._cancelled.labels(stage).inc()
        self._totals.add('fomoe_requests_total{reason="cancelled"}')

    def failed(self) -> None:
        """Count an answer that ended in an error."""
        self._totals.add('fomoe_requests_total{reason="error"}')

    def answered(self, reason: str, receipt: Receipt) -> None:
        """Add up a finished answer; reason is stop or length."""
        add = self._totals.add
        add(f'fomoe_requests_total{{reason="{reason}"}}')
        add("fomoe_prompt_tokens_total", receipt.prompt_tokens - receipt.cached_tokens)
        add("fomoe_prompt_cached_tokens_total", receipt.cached_tokens)
        add("fomoe_prompt_seconds_total", receipt.prompt_ms / 1e3)
        add("fomoe_generated_tokens_total", receipt.generated_tokens)
        add("fomoe_generated_seconds_total", receipt.generated_ms / 1e3)
        for tier, count in (
            ("device", receipt.hits_device),
            ("ram", receipt.hits_ram),
            ("nvme", receipt.reads_nvme),
        ):
            add(f'fomoe_expert_lookups_total{{tier="{tier}"}}', count)
        add("fomoe_substitutions_total", receipt.substituted)
        add("fomoe_router_mass_lost_total", receipt.lost_mass)
        add("fomoe_logical_bytes_total", receipt.logical_bytes)
        add("fomoe_shadow_steps_total", receipt.shadow_steps)
        add("fomoe_shadow_kl_nats_total", receipt.shadow_kl)
        for cause, n_bytes in receipt.bytes_by_cause.items():
            add(f'fomoe_expert_cause_bytes_total{{cause="{cause}"}}', n_bytes)
        if receipt.estimated_kl is not None:
            self._totals.set("fomoe_estimated_kl", receipt.estimated_kl)
        self._totals.set("fomoe_quality_price", receipt.price)
        if any(receipt.outcomes.values()):
            for outcome, share in shares(receipt.outcomes).items():
                self._totals.set(f'fomoe_expert_share{{outcome="{outcome}"}}', share)
        add("fomoe_expert_stall_seconds_total", receipt.stall_ms / 1e3)

    def first_token(self, seconds: float) -> None:
        """Record the wait for a first token."""
        self._first_token.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """Record the time between two tokens."""
        self._next_token.observe(seconds)


class _EngineCollector(Collector):
    """Shows every metric of the table: the engine's figure, or the sum over receipts without it."""

    def __init__(self, engine: Engine, totals: Telemetry) -> None:
        self._engine = engine
        self._totals = totals

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield one family per metric."""
        status = self._engine.status()
        values = self._totals.snapshot() | _state(status) | status.counters
        for metric in METRICS:
            yield _family(metric, values)


def _state(status: EngineStatus) -> dict[str, float]:
    return {
        "fomoe_requests_running": float(status.running),
        "fomoe_requests_queued": float(status.queued),
        "fomoe_ready": float(status.state == "ready"),
        "fomoe_load_progress": status.load_progress,
    }


def _family(metric: Metric, values: dict[str, float]) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=[metric.label] if metric.label else [])
    for series in metric.series():
        label = _SERIES.fullmatch(series)
        family.add_metric([label[1]] if label else [], values.get(series, 0.0))
    return family
