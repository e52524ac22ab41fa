"""What looking ahead in decode is worth: runs with and without it by turns, on the same text.

One engine per way, each on a Ray of its own, all alive in turns: the same ids are decoded by each,
from caches that the same prompt has warmed. Per turn: stall and wall time per token, bytes read per
token, and of what was prefetched how much was wanted (precision) and how much of what had to be
read it was (recall on misses). Differences are paired by turn, with a bootstrap interval of their
mean.

Run: python benchmarks/prefetch.py MODEL [--share 0.25] [--turns 10] [--ways 0:0,1:0.05,2:0.05]
A way is depth:budget. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from versus.quiet import Others

from fomoe.engine.requests import Finished, GenerateRequest, Receipt, SamplingParams
from fomoe.errors import EngineError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.llm import LLM
from fomoe.model.archs import read_spec

NUMBERS = itertools.count()
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Way:
    """How far an engine looks ahead, and what reads in vain may add to its bytes."""

    depth: int
    budget: float

    @classmethod
    def parse(cls, text: str) -> Way:
        """Read `depth:budget`."""
        depth, _, budget = text.partition(":")
        return cls(int(depth), float(budget or 0))

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"depth {self.depth}, budget {self.budget:.0%}" if self.depth else "none"

    def options(self) -> dict[str, Any]:
        """Arguments of `LLM`."""
        return {"prefetch_depth": self.depth, "prefetch_budget": self.budget}


def expert_bytes(path: Path) -> int:
    """Return the bytes of slots that all routed experts would take."""
    file = open_gguf(path)
    spec = read_spec(file)
    table = ExpertTable.from_gguf(file, spec.n_layers)
    return sum(table.slot_bytes(layer) for layer in range(spec.n_layers)) * spec.moe.n_experts


def decode(llm: LLM, first: int, prompt: int, tokens: int) -> Receipt:
    """Run ids `first`.. as a prompt, the following `tokens` one by one."""
    ids = list(range(first, first + prompt + tokens + 1))
    request = GenerateRequest(
        request_id=f"ahead-{next(NUMBERS)}", prompt=ids[:prompt], max_tokens=tokens + 1,
        forced=ids[prompt:], sampling=SamplingParams(temperature=0.0),
    )  # fmt: skip
    for event in llm.engine.stream(request):
        if isinstance(event, Finished):
            if event.error is not None:
                raise EngineError(event.error)
            return event.receipt
    raise EngineError("the request ended without a receipt")


def turn(llm: LLM, first: int, prompt: int, tokens: int) -> dict[str, float]:
    """Decode a text; per token, but for counts."""
    before, others = llm.read_stats(), Others(os.getpid())
    receipt = decode(llm, first, prompt, tokens)
    reads = {name: value - before[name] for name, value in llm.read_stats().items()}
    started = receipt.prefetched - receipt.prefetched_dropped
    return {
        "ms": receipt.generated_ms / tokens,
        "stall_ms": receipt.generated_parts_ms["disk"] / tokens,
        "read_mb": (reads["bytes"]) / 1e6,
        "misses": receipt.reads_nvme,
        "prefetched": receipt.prefetched,
        "used": receipt.prefetched_used,
        "dropped": receipt.prefetched_dropped,
        "precision": receipt.prefetched_used / max(1, started),
        "recall": receipt.prefetched_used / max(1, receipt.reads_nvme),
        "met_landed": reads["met_landed"],
        "met_begun": reads["met_begun"],
        "met_queued": reads["met_queued"],
        "others_cores": others.cores(),
        "hash": float(int(receipt.decision_hash, 16) % (1 << 52)),
    }


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Return mean and 95 % bootstrap interval of paired differences."""
    values = np.array(differences)
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def summary(runs: list[dict[str, float]], plain: list[dict[str, float]]) -> dict[str, Any]:
    """Compare turns with those of the plain way."""
    used, read = sum(r["used"] for r in runs), sum(r["prefetched"] - r["dropped"] for r in runs)
    out: dict[str, Any] = {
        name: round(statistics.median(r[name] for r in runs), 3) for name in ("ms", "stall_ms")
    }
    out["precision"] = round(used / max(1.0, read), 3)
    out["recall_on_misses"] = round(used / max(1.0, sum(r["misses"] for r in runs)), 3)
    out["bytes_ratio"] = round(
        sum(r["read_mb"] for r in runs) / sum(r["read_mb"] for r in plain), 4
    )
    for name in ("met_landed", "met_begun", "met_queued"):
        out[name] = sum(r[name] for r in runs)
    for name in ("stall_ms", "ms"):
        pairs = [b[name] - a[name] for a, b in zip(runs, plain, strict=True)]
        out[f"{name}_saved"] = [round(x, 3) for x in interval(pairs)]
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--share", type=float, default=0.167, help="experts that have a slot")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--ways", default="0:0,1:0.05,2:0.05")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    ways = [Way.parse(text) for text in args.ways.split(",")]
    budget = int(expert_bytes(args.model) * args.share)
    runs: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    with ExitStack() as stack:
        engines = {
            way.name: stack.enter_context(
                LLM(args.model, vram_budget=budget, ram_budget=0, threads=args.threads,
                    ctx_size=args.prompt + args.tokens + 2, **way.options())
            )
            for way in ways
        }  # fmt: skip
        length = args.prompt + args.tokens + 1
        for number in range(args.turns + 1):
            names = list(engines)
            turned = names[number % len(names) :] + names[: number % len(names)]
            row = {n: turn(engines[n], number * length, args.prompt, args.tokens) for n in turned}
            if len({r["hash"] for r in row.values()}) > 1:
                raise EngineError("looking ahead changed a decision")
            text = "  ".join(
                f"{n}: {r['ms']:.1f} ms, stalled {r['stall_ms']:.1f}" for n, r in row.items()
            )
            load = Path("/proc/loadavg").read_text().split()[0]
            print(f"{number or 'warm'}  {text}  (load {load})", flush=True)
            if number:  # the first turn warms caches and counts
                for name, run in row.items():
                    runs[name].append(run)
    plain = runs[ways[0].name]
    table = {name: summary(rows, plain) for name, rows in runs.items()}
    for name, figures in table.items():
        print(f"{name}: {figures}")
    print(json.dumps({"model": args.model.name, "share": args.share, "tokens": args.tokens,
                      "ways": table, "turns": runs}))  # fmt: skip


if __name__ == "__main__":
    main()
