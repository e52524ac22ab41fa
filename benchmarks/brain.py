"""What deciding costs per layer: router scores to experts, and where those lie, for one token.

Run: python benchmarks/brain.py [--tokens 512] [--device-slots 50] [--ram-slots 36]. 512 experts,
top-10, scores that persist from token to token like the measured ones, so that the share of misses
is real: each layer routes, tells the logical cache, plans and releases. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from synthetic.routing import Drift, embeddings, fitted_popularity, router

from fomoe.residency import LFRU, LogicalCache, Residency, Topology
from fomoe.routing import route_exact
from fomoe.types import Tier

EXPERTS, TOP_K, HIDDEN = 512, 10, 768
WARMUP = 256  # tokens that fill the caches


def scores(tokens: int, layers: int) -> npt.NDArray[np.float32]:
    """Return router scores float32 [layers, tokens, 512]."""
    drift = Drift()
    text = embeddings(np.random.default_rng(0), tokens, HIDDEN, drift)
    rng = np.random.default_rng(1)
    rows = (router(rng, fitted_popularity(rng, EXPERTS), HIDDEN, drift) for _ in range(layers))
    return np.stack([text @ each.T for each in rows])


def topology(layers: int, device_slots: int, ram_slots: int) -> Topology:
    """Return one device and one size class."""
    zeros = np.zeros(layers, dtype=np.int32)
    return Topology(
        n_layers=layers,
        n_experts=EXPERTS,
        layer_device=zeros,
        layer_class=zeros,
        device_slots={(0, 0): device_slots * layers},
        ram_slots={(0, 0): ram_slots * layers},
        device_node=(0,),
    )


class Steps:
    """The brain of a driver, with the time of each part in microseconds."""

    def __init__(self, layers: int, device_slots: int, ram_slots: int) -> None:
        self.residency = Residency(topology(layers, device_slots, ram_slots), LFRU())
        self._logical = LogicalCache(layers, EXPERTS, device_slots)
        self.times: dict[str, list[float]] = {}

    def step(self, layer: int, row: npt.NDArray[np.float32]) -> None:
        """Decide one layer of one token from its scores float32 [1, 512]."""
        route = self._time("route", lambda: route_exact(row, TOP_K))
        self._time("logical", lambda: self._logical.observe(layer, route.ids))
        wanted = np.sort(route.ids[0])
        self._time("plan", lambda: self.residency.plan(layer, wanted))
        self._time("release", lambda: self.residency.release(layer))

    def _time(self, part: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter_ns()
        result = call()
        self.times.setdefault(part, []).append((time.perf_counter_ns() - start) / 1e3)
        return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the tokens; returns medians per part in microseconds, and the hit rates."""
    logits = scores(WARMUP + args.tokens, args.layers)
    steps = Steps(args.layers, args.device_slots, args.ram_slots)
    before, whole = steps.residency.counters.copy(), []
    gc.disable()
    for token in range(WARMUP + args.tokens):
        if token == WARMUP:
            before, whole = steps.residency.counters.copy(), []
            steps.times.clear()
        for layer in range(args.layers):
            start = time.perf_counter_ns()
            steps.step(layer, logits[layer, token : token + 1])
            whole.append((time.perf_counter_ns() - start) / 1e3)
    gc.enable()
    lookups = (steps.residency.counters.lookups - before.lookups).sum(axis=0)
    parts = steps.times | {"layer": whole}
    return {
        "us": {part: round(statistics.median(times), 2) for part, times in parts.items()},
        "layer_p99_us": round(statistics.quantiles(whole, n=100)[98], 2),
        "device_hits": round(float(lookups[Tier.DEVICE] / lookups.sum()), 4),
        "ram_hits": round(float(lookups[Tier.RAM] / lookups.sum()), 4),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--device-slots", type=int, default=50)
    parser.add_argument("--ram-slots", type=int, default=36)
    result = measure(parser.parse_args())
    print(f"device hits {result['device_hits']:.1%}, RAM hits {result['ram_hits']:.1%}")
    for part, us in result["us"].items():
        print(f"{part:8} p50 {us:8.2f} us")
    print(f"layer    p99 {result['layer_p99_us']:8.2f} us")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
