"""Running totals on Ray's metrics port, under the names of `telemetry.METRICS`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from fomoe.telemetry import METRICS, samples

_PERIOD_S = 1.0


class RayMetrics:
    """Publishes snapshots once a second from a thread of its own, never from the layer loop."""

    def __init__(self, snapshot: Callable[[], dict[str, float]]) -> None:
        from ray.util.metrics import Counter, Gauge

        kinds = {"counter": Counter, "gauge": Gauge}
        self._snapshot = snapshot
        self._published: dict[str, float] = {}
        self._metrics: dict[str, Any] = {
            m.name: kinds[m.kind](
                m.name, description=m.help, tag_keys=(m.label,) if m.label else ()
            )
            for m in METRICS
        }
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fomoe-metrics", daemon=True)
        self._thread.start()

    def publish(self) -> None:
        """Publish one snapshot."""
        snapshot = self._snapshot()
        for series, (metric, labels, value) in zip(snapshot, samples(snapshot), strict=True):
            if metric.kind == "gauge":
                self._metrics[metric.name].set(value, tags=labels)
                continue
            grown = value - self._published.get(series, 0.0)
            if grown > 0:
                self._metrics[metric.name].inc(grown, tags=labels)
                self._published[series] = value

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(_PERIOD_S):
            self.publish()
