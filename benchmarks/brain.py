"""Cost of the decisions of a decode step, per layer: routing, residency, segment, look-ahead.

A synthetic trace of 512 experts, top-10 (`fomoe.traces.synthetic`), 60 layers that share their
pools: exclusive RAM, LFRU, one token at a time. Guesses for the next layer are its true experts but
for one in five.

Run: python benchmarks/brain.py [--tokens 150] [--layers 60] [--device 50] [--ram 36]
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.engine.ahead import AheadArrays
from fomoe.engine.brain import Brain
from fomoe.engine.decisions import Decider
from fomoe.engine.transfers import ENTRY, SegmentSlots
from fomoe.engine.waves import Priorities, StepArrays, WaveLayout, WavePlanner
from fomoe.model.state import Batch
from fomoe.residency import LFRU, LogicalCache, LogicalCaches, LogicalRules, Residency, Topology
from fomoe.residency.reference import ReferenceResidency
from fomoe.routing import (
    CacheAwareRouting,
    DropRouting,
    ExactRouting,
    PriceRouting,
    group_by_expert,
    predict_experts,
    reference,
    route_exact,
)
from fomoe.routing.router import softmax
from fomoe.traces import synthetic_ids

E, K, EXPERT_BYTES = 512, 10, 7_077_888
SWEEP_BYTES = 48 << 20  # more than a third-level cache
CASES = {
    "decode": {"ahead": False, "cold": False, "apart": False},
    "decode by a price": {"ahead": False, "cold": False, "apart": False, "ruled": True},
    "decode by a price, cold caches": {
        "ahead": False,
        "cold": True,
        "apart": False,
        "ruled": True,
    },
    "decode, routed apart": {"ahead": False, "cold": False, "apart": True},
    "decode, look-ahead": {"ahead": True, "cold": False, "apart": False},
    "decode, look-ahead, cold caches": {"ahead": True, "cold": True, "apart": False},
}
Scores = npt.NDArray[np.float32]


class Clock:
    """Microseconds by part."""

    def __init__(self) -> None:
        self.us: dict[str, list[float]] = defaultdict(list)

    def time(self, part: str, call: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter_ns()
        result = call(*args)
        self.us[part].append((time.perf_counter_ns() - start) / 1e3)
        return result

    def result(self) -> dict[str, dict[str, float]]:
        def at(values: list[float], q: float) -> float:
            return round(float(np.percentile(values, q)), 2)

        return {p: {"p50_us": at(v, 50), "p99_us": at(v, 99)} for p, v in self.us.items()}


def topology(layers: int, device: int, ram: int) -> Topology:
    zeros = np.zeros(layers, np.int32)
    return Topology(
        n_layers=layers, n_experts=E, layer_device=zeros, layer_class=zeros, device_node=(0,),
        device_slots={(0, 0): device * layers}, ram_slots={(0, 0): ram * layers},
    )  # fmt: skip


def scores_of(ids: npt.NDArray[np.int32], rng: np.random.Generator) -> Scores:
    """Router scores [L, 1, E] whose top-k are the trace's."""
    scores = rng.normal(size=(len(ids), 1, E)).astype(np.float32)
    np.put_along_axis(scores, ids[:, None], 5 + rng.random((len(ids), 1, K), np.float32), axis=2)
    return scores


def guesses_of(ids: npt.NDArray[np.int32], rng: np.random.Generator) -> Scores:
    """Scores for the look-ahead: four of five experts are right."""
    wrong = rng.random(ids.shape) < 0.2
    guesses = np.where(wrong, rng.integers(0, E, ids.shape), ids)
    return scores_of(guesses.astype(np.int32), rng)


class Native:
    """What a driver holds."""

    def __init__(self, t: Topology) -> None:
        slots = t.device_slots[0, 0] + t.ram_slots[0, 0]
        zeros = np.zeros(t.n_layers, np.int32)
        layout = WaveLayout(
            layer_node=zeros, layer_device=zeros,
            expert_bytes=np.full(t.n_layers, EXPERT_BYTES, np.int64),
        )  # fmt: skip
        segment = SegmentSlots({0: (slots, EXPERT_BYTES)}, zeros, E)
        self.residency = Residency(t, LFRU())
        ahead = AheadArrays(t.n_layers, E, 1.0)
        ahead.allowed[:] = True
        self.planner = WavePlanner(
            self.residency, [segment], layout, Priorities(0, 1, 3), ahead, max_tokens=1, top_k=K
        )
        self.brain = Brain(K)
        logical = LogicalCache(t.n_layers, E, LogicalRules(capacity=E))
        self.sequence: Any = SimpleNamespace(
            touched=0.0,
            decoding=True,
            logical=logical,
            decider=None,
            lossy=False,
            reads=zeros.copy(),
        )
        self.decider = Decider(
            PriceRouting(0.05),
            LogicalCaches(1, t.n_layers, E, LogicalRules(capacity=slots // t.n_layers,
                                                         backfill=Fraction(28, 60))),
            K,
        )  # fmt: skip
        self.step = StepArrays(
            np.zeros((1, K), np.int32), np.zeros((1, K), np.float32), np.zeros(K, np.int32),
            np.zeros(K + 1, np.int32), np.zeros(K, ENTRY),
        )  # fmt: skip

    def decide_by(self, layer: int, scores: Scores) -> None:
        """What the loop does for a sequence with a rule: one native call, and its counts."""
        self.planner.decide_by(layer, scores, self.decider, None, self.step)
        self.brain.take(layer, self.sequence, self.decider.out)


def decide_rows(t: Topology, rows: int) -> dict[str, dict[str, float]]:
    """Microseconds a row of decisions for many sequences: full rows, and a trace's 64 experts."""
    rng, clock = np.random.default_rng(2), Clock()
    taste = rng.normal(size=(t.n_layers, 1, E))
    mood = rng.normal(0, 1.5, (t.n_layers, rows, E))
    cases = [ExactRouting(), CacheAwareRouting(0.35), PriceRouting(0.05), DropRouting(0.1)]
    shape = rows, t.n_layers, E, LogicalRules(capacity=86, backfill=Fraction(28, 60))
    deciders = {
        f"{rule.name}{kind}": Decider(rule, LogicalCaches(*shape), K)
        for rule in cases
        for kind in ("", " of 64")
    }
    for token in range(24):
        mood = 0.9 * mood + 0.43 * rng.normal(0, 1.5, mood.shape)
        scores = (mood + taste).astype(np.float32)
        ids = np.argsort(-scores, axis=2, kind="stable")[:, :, :64].astype(np.int32)
        p = np.stack(
            [np.take_along_axis(softmax(s), i, 1) for s, i in zip(scores, ids, strict=True)]
        )
        if token == 12:
            clock.us.clear()
        for layer in range(t.n_layers):
            for name, decider in deciders.items():
                if name.endswith("of 64"):
                    clock.time(name, decider.decide_compact, layer, ids[layer], p[layer])
                else:
                    clock.time(name, decider.decide, layer, scores[layer])
    return {
        name: {part: round(value / rows, 2) for part, value in us.items()}
        for name, us in clock.result().items()
    }


def decode(
    native: Native, trace: npt.NDArray[np.int32], *, ahead: bool, cold: bool, apart: bool,
    ruled: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The calls of the layer loop, the first third of the trace unmeasured.

    `cold` drives the caches out between two layers, as the kernels do; `apart` routes in a call of
    its own, as batches need; `ruled` decides by a price with background reads.
    """
    rng, clock = np.random.default_rng(1), Clock()
    planner, layers = native.planner, trace.shape[1]
    state: Any = SimpleNamespace(length=0)
    batch = Batch.of([(state, [0])])
    prefetched, by_tier = 0, np.zeros(3, np.int64)
    sweep = np.zeros(SWEEP_BYTES // 8 if cold else 0)
    for token, ids in enumerate(trace):
        if token == len(trace) // 3:
            clock.us.clear()
            prefetched, by_tier = 0, np.zeros(3, np.int64)
        scores, guesses = scores_of(ids, rng), guesses_of(ids, rng)
        for layer in range(layers):
            sweep += 1
            if apart:
                what = layer, scores[layer], batch, (native.sequence,)
                route = clock.time("route", native.brain.route, *what)
                clock.time("place", planner.place, layer, route, native.step)
            elif ruled:
                clock.time("decide_by", native.decide_by, layer, scores[layer])
            else:
                args = layer, scores[layer], native.sequence.logical, native.step
                clock.time("decide", planner.decide, *args)
            by_tier += planner.arrays.counts[:3]
            if ahead and layer + 1 < layers:
                clock.time("look_ahead", planner.look_ahead, layer + 1, guesses[layer + 1])
                prefetched += int(planner.arrays.counts[7])
            clock.time("release", native.residency.release, layer)
    steps = int(by_tier.sum()) / K
    return {
        "parts": clock.result(),
        "not_on_device": round(int(by_tier[1:].sum()) / steps, 2),
        "prefetched": round(prefetched / steps, 2),
    }


def parts(t: Topology, trace: npt.NDArray[np.int32], python: bool) -> dict[str, dict[str, float]]:
    """Single calls; with `python` those of the reference."""
    rng, clock = np.random.default_rng(1), Clock()
    residency = (ReferenceResidency if python else Residency)(t, LFRU())
    logical = LogicalCache(t.n_layers, E, LogicalRules(capacity=E))
    for token, ids in enumerate(trace):
        if token == len(trace) // 3:
            clock.us.clear()
        scores = scores_of(ids, rng)
        for layer in range(t.n_layers):
            clock.time("plan", residency.plan, layer, np.sort(ids[layer]))
            residency.release(layer)
            if python:
                clock.time("route", reference.route, scores[layer], K)
                clock.time("predict", reference.predict, scores[layer], K)
            else:
                clock.time("route", route_exact, scores[layer], K)
                clock.time("predict", predict_experts, scores[layer], K)
                clock.time("group", group_by_expert, ids[layer, None])
                clock.time("observe", logical.observe, layer, ids[layer, None])
                clock.time("commit", logical.commit, layer, ids[layer, None])
    return clock.result()


def show(title: str, result: dict[str, dict[str, float]]) -> None:
    print(title)
    for part, us in result.items():
        print(f"  {part:18} p50 {us['p50_us']:8.2f} us   p99 {us['p99_us']:8.2f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--device", type=int, default=50)
    parser.add_argument("--ram", type=int, default=36)
    args = parser.parse_args()
    t = topology(args.layers, args.device, args.ram)
    trace = synthetic_ids(args.tokens, args.layers, seed=0)
    results: dict[str, Any] = {}
    for name, modes in CASES.items():
        part = trace[: len(trace) // 3] if modes["cold"] else trace
        results[name] = result = decode(Native(t), part, **modes)
        counts = f"{result['not_on_device']} not on device, {result['prefetched']} prefetched"
        show(f"{name} (per layer: {counts})", result["parts"])
    results["decisions, per row"] = decide_rows(t, 16)
    show("decisions, per row of 16", results["decisions, per row"])
    for name, python in (("single calls", False), ("reference in Python", True)):
        results[name] = parts(t, trace[: len(trace) // 2] if python else trace, python)
        show(name, results[name])
    print(json.dumps({"slots": [args.device, args.ram], "layers": args.layers, **results}))


if __name__ == "__main__":
    main()
