"""Speed of offline replay: tokens per second of one core, by policy, on synthetic texts.

Processor time, so that other work on the machine does not count; the best of a few runs.

Run: python benchmarks/replay.py [--layers 60] [--texts 1,16] [--tokens 300] [--capacity 86]
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from fomoe.engine.decisions import Decider
from fomoe.residency.logical import LogicalCaches
from fomoe.sim.policies import parse_policy
from fomoe.sim.replay import Point, run_point
from fomoe.traces import Synthesis, Trace, TraceFacts, TraceWriter

POLICIES = (
    "lru", "lfru", "mass", "car=0.35+lru", "price=0.05+lfru", "bytes=400MB/token+lfru",
    "drop=0.1+lfru", "car=0.35+lru+background=28/60", "belady",
)  # fmt: skip
RUNS = 3


def written(path: Path, layers: int, texts: int, tokens: int) -> Trace:
    facts = TraceFacts(
        model="synthetic", n_layers=layers, n_experts=512, top_k=10,
        expert_bytes=(7_077_888,) * layers,
    )  # fmt: skip
    with TraceWriter(path, facts) as writer:
        for passage, rows in Synthesis(facts=facts, texts=texts, tokens=tokens).passages():
            writer.append(passage, rows)
    return Trace.open(path)


def rate(trace: Trace, policy: str, capacity: int) -> float:
    point = Point(trace.path, tuple(t.rows for t in trace.sequences), policy, capacity)
    seconds = []
    for _ in range(RUNS):
        started = time.process_time()
        run_point(point)
        seconds.append(time.process_time() - started)
    return len(trace) / min(seconds)


def last_rank(trace: Trace, policy: str, capacity: int) -> int:
    """The lowest rank, from 1, of an expert that ran in any layer and token of a first text."""
    facts, parsed = trace.facts, parse_policy(policy)
    caches = LogicalCaches(1, facts.n_layers, 512, parsed.logical_rules(capacity))
    assert parsed.rule is not None
    decider, worst = Decider(parsed.rule, caches, facts.top_k), 0
    for row in trace.sequences[0].rows:
        for layer in range(facts.n_layers):
            ids = np.ascontiguousarray(trace.ids[row, layer][None], np.int32)
            p = np.ascontiguousarray(trace.probabilities[row, layer][None], np.float32)
            ran = decider.decide_compact(layer, ids, p).ids[0]
            worst = max(worst, int(np.flatnonzero(np.isin(ids[0], ran)).max()) + 1)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--texts", default="1,16")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--capacity", type=int, default=86)
    args = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for texts in map(int, args.texts.split(",")):
            trace = written(Path(folder) / f"{texts}", args.layers, texts, args.tokens)
            print(f"{texts} texts of {args.tokens} tokens, {args.layers} layers, top-10 of 512")
            results[str(texts)] = rates = {}
            for policy in POLICIES:
                rates[policy] = round(rate(trace, policy, args.capacity))
                print(f"  {policy:32} {rates[policy]:8,.0f} tokens per second and core")
        worst = last_rank(trace, "car=0.35+lru", args.capacity)
        print(f"lowest rank that ran at CAR 0.35: {worst}")
    print(json.dumps({"layers": args.layers, "tokens": args.tokens, "rates": results}))


if __name__ == "__main__":
    main()
