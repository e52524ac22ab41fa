"""Cost of the decisions of a decode step, per layer: routing, residency, segment, look-ahead.

A synthetic trace of 512 experts, top-10 (`fomoe.residency.replay`), 60 layers that share their
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

import numpy as np
import numpy.typing as npt

from fomoe.engine.transfers import ENTRY, SegmentSlots
from fomoe.engine.waves import Priorities, StepArrays, WaveLayout, WavePlanner
from fomoe.residency import LFRU, LogicalCache, Residency, Topology
from fomoe.residency.reference import ReferenceResidency
from fomoe.residency.replay import synthetic_trace
from fomoe.routing import group_by_expert, predict_experts, reference, route_exact

E, K, EXPERT_BYTES = 512, 10, 7_077_888
Scores = npt.NDArray[np.float32]


class Clock:
    """Microseconds by part."""

    def __init__(self) -> None:
        self.us: dict[str, list[float]] = defaultdict(list)

    def time(self, part: str, call: Callable[[], object]) -> None:
        start = time.perf_counter_ns()
        call()
        self.us[part].append((time.perf_counter_ns() - start) / 1e3)

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
        self.planner = WavePlanner(
            self.residency, [segment], layout, Priorities(0, 1), max_tokens=1, top_k=K
        )
        self.logical = LogicalCache(t.n_layers, E, E)
        self.step = StepArrays(
            np.zeros((1, K), np.int32), np.zeros((1, K), np.float32), np.zeros(K, np.int32),
            np.zeros(K + 1, np.int32), np.zeros(K, ENTRY),
        )  # fmt: skip


def decode(native: Native, trace: npt.NDArray[np.int32], *, ahead: bool) -> dict[str, object]:
    """The calls of the layer loop, the first third of the trace unmeasured."""
    rng, clock = np.random.default_rng(1), Clock()
    planner, layers = native.planner, trace.shape[1]
    reads = counts = 0
    for token, ids in enumerate(trace):
        if token == len(trace) // 3:
            clock.us.clear()
            reads = counts = 0
        scores, guesses = scores_of(ids, rng), guesses_of(ids, rng)
        for layer in range(layers):
            what = (layer, scores[layer], native.logical, native.step)
            clock.time("decide", lambda what=what: planner.decide(*what))  # type: ignore[misc]
            counts = counts + planner.arrays.counts[:3]
            if ahead and layer + 1 < layers:
                nxt = (layer + 1, guesses[layer + 1])
                clock.time("look_ahead", lambda nxt=nxt: planner.look_ahead(*nxt))  # type: ignore[misc]
                reads += int(planner.arrays.counts[4])
            clock.time("release", lambda layer=layer: native.residency.release(layer))  # type: ignore[misc]
    device, ram, nvme = (int(n) for n in counts)
    total = device + ram + nvme
    layers_run = total / K
    return {
        "parts": clock.result(),
        "misses_per_layer": round((ram + nvme) / layers_run, 2),
        "prefetches_per_layer": round(reads / layers_run, 2),
    }


def parts(t: Topology, trace: npt.NDArray[np.int32], python: bool) -> dict[str, dict[str, float]]:
    """Single calls; with `python` those of the reference."""
    rng, clock = np.random.default_rng(1), Clock()
    residency = (ReferenceResidency if python else Residency)(t, LFRU())
    logical = LogicalCache(t.n_layers, E, E)
    for token, ids in enumerate(trace):
        if token == len(trace) // 3:
            clock.us.clear()
        scores = scores_of(ids, rng)
        for layer in range(t.n_layers):
            row, wanted = scores[layer], np.sort(ids[layer])
            if python:
                clock.time("route", lambda row=row: reference.route(row, K))  # type: ignore[misc]
                clock.time("predict", lambda row=row: reference.predict(row, K))  # type: ignore[misc]
            else:
                clock.time("route", lambda row=row: route_exact(row, K))  # type: ignore[misc]
                clock.time("predict", lambda row=row: predict_experts(row, K))  # type: ignore[misc]
                two = ids[layer : layer + 1]
                clock.time("group", lambda two=two: group_by_expert(two))  # type: ignore[misc]
                what = (layer, two)
                clock.time("observe", lambda what=what: logical.observe(*what))  # type: ignore[misc]
                clock.time("commit", lambda what=what: logical.commit(*what))  # type: ignore[misc]
            plan = (layer, wanted)
            clock.time("plan", lambda plan=plan: residency.plan(*plan))  # type: ignore[misc]
            residency.release(layer)
            if not python:
                clock.time("tier_of", lambda layer=layer: residency.tier_of(layer))  # type: ignore[misc]
    return clock.result()


def show(title: str, result: dict[str, dict[str, float]]) -> None:
    print(title)
    for part, us in result.items():
        print(f"  {part:12} p50 {us['p50_us']:8.2f} us   p99 {us['p99_us']:8.2f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--device", type=int, default=50)
    parser.add_argument("--ram", type=int, default=36)
    args = parser.parse_args()
    t = topology(args.layers, args.device, args.ram)
    trace = synthetic_trace(args.tokens, args.layers, seed=0)
    results: dict[str, object] = {}
    for name, ahead in (("decode", False), ("decode with look-ahead", True)):
        results[name] = result = decode(Native(t), trace, ahead=ahead)
        show(f"{name}: {result['misses_per_layer']} misses a layer", result["parts"])  # type: ignore[arg-type]
    for name, python in (("single calls", False), ("the same in Python", True)):
        results[name] = part = parts(t, trace, python)
        show(name, part)
    print(json.dumps({"slots": [args.device, args.ram], "layers": args.layers, **results}))


if __name__ == "__main__":
    main()
