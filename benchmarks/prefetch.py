"""What looking ahead in decode is worth: blocks of tokens with and without it, by turns.

One engine decodes one text of consecutive ids. Every few tokens it is told how far to look ahead;
the ways take turns in random order inside each round, so that what else the machine does meets all
of them alike. Per way: stall and wall time per token with the paired difference to the first way
(mean and median over rounds, bootstrap intervals), how much of what was prefetched was wanted
(precision), and how much of what had to be read had been asked for ahead (recall on misses).

Whole answers (`--whole`) compare bytes instead: an engine per way, of its own history, decodes the
same text; reads in vain and what they displace show in what storage read.

Run: python benchmarks/prefetch.py MODEL [--share 0.167] [--rounds 24] [--ways 0,1,2] [--whole]
The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fomoe.actors.names import DRIVER
from fomoe.cli.bench import _run_once
from fomoe.engine.requests import Receipt
from fomoe.engine.waterfall import PARTS
from fomoe.errors import EngineError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.llm import LLM
from fomoe.model.archs import read_spec

NUMBERS = itertools.count()
RESAMPLES = 10_000


def expert_bytes(path: Path) -> int:
    """Return the bytes of slots that all routed experts would take."""
    file = open_gguf(path)
    spec = read_spec(file)
    table = ExpertTable.from_gguf(file, spec.n_layers)
    return sum(table.slot_bytes(layer) for layer in range(spec.n_layers)) * spec.moe.n_experts


@dataclass(frozen=True, slots=True)
class Text:
    """How a text of consecutive ids is cut: a prompt, then blocks."""

    prompt: int
    block: int
    rounds: int

    def tokens(self, ways: int) -> int:
        """Return how long it gets."""
        return self.prompt + self.rounds * ways * (self.block + 1) + 1


@dataclass(frozen=True, slots=True)
class Block:
    """Means per token of one block, and its receipt."""

    ms: float
    stall_ms: float
    receipt: Receipt


def decode(llm: LLM, known: int, tokens: int) -> Block:
    """Continue ids 0.. of which `known` are prompt by `tokens` more, one by one.

    An engine that holds all but the last of the known ones goes on where it is.
    """
    receipt, parts = _run_once(
        llm, f"ahead-{next(NUMBERS)}", list(range(known)), list(range(known, known + tokens + 1)),
        waterfall=True,
    )  # fmt: skip
    steps = parts[1:]  # the first token comes out of the prompt's pass
    disk = PARTS.index("disk")
    return Block(
        ms=1e3 * sum(map(sum, steps)) / tokens,
        stall_ms=1e3 * sum(step[disk] for step in steps) / tokens,
        receipt=receipt,
    )


def interval(differences: list[float], centre: Callable[..., Any]) -> list[float]:
    """Return mean or median of paired differences, and its 95 % bootstrap interval."""
    values = np.array(differences)
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(centre(values[picks], axis=1), [2.5, 97.5])
    return [round(float(x), 3) for x in (centre(values), low, high)]


def foresight(receipts: list[Receipt]) -> dict[str, float]:
    """Return what became of guesses."""
    asked = sum(r.prefetched for r in receipts)
    used = sum(r.prefetched_used for r in receipts)
    dropped = sum(r.prefetched_dropped for r in receipts)
    misses = sum(r.reads_nvme for r in receipts)
    return {
        "asked": asked, "used": used, "never_read": dropped, "misses": misses,
        "precision": round(used / max(1, asked - dropped), 3),
        "recall_on_misses": round(used / max(1, misses), 3),
    }  # fmt: skip


def by_turns(llm: LLM, text: Text, ways: list[int]) -> dict[str, Any]:
    """Decode one text, the ways in random order in each round."""
    rng, known = random.Random(0), text.prompt
    blocks: dict[int, list[Block]] = {way: [] for way in ways}
    for number in range(text.rounds):
        for way in rng.sample(ways, len(ways)):
            llm.engine.running.handles[DRIVER].call("reach", way).result(10)
            block = decode(llm, known, text.block)
            known += text.block + 1
            if number:  # in the first, counts of guesses are made
                blocks[way].append(block)
        load = Path("/proc/loadavg").read_text().split()[0]
        row = "  ".join(f"{w}: {b[-1].ms:.0f} ({b[-1].stall_ms:.1f})" for w, b in blocks.items()
                        if b)  # fmt: skip
        print(f"{number}  ms (stalled) by depth  {row}  load {load}", flush=True)
    plain, out = blocks[ways[0]], {}
    for way, runs in blocks.items():
        figures: dict[str, Any] = {
            "ms": round(statistics.median(b.ms for b in runs), 2),
            "stall_ms": round(statistics.median(b.stall_ms for b in runs), 2),
        }
        for name in ("stall_ms", "ms"):
            saved = [getattr(a, name) - getattr(b, name) for a, b in zip(plain, runs, strict=True)]
            figures[f"{name}_saved"] = interval(saved, np.mean)
            figures[f"{name}_saved_median"] = interval(saved, np.median)
        out[str(way)] = figures | foresight([b.receipt for b in runs])
    return out


def whole(open_engine: Callable[[int], LLM], text: Text, ways: list[int]) -> dict[str, Any]:
    """Decode one text with an engine per way; compare what storage read."""
    out: dict[str, Any] = {}
    hashes = set()
    for way in ways:
        with open_engine(way) as llm:
            before = llm.read_stats()
            run = decode(llm, text.prompt, text.rounds * text.block)
            reads = {name: value - before[name] for name, value in llm.read_stats().items()}
        hashes.add(run.receipt.decision_hash)
        met = {name: reads[name] for name in ("met_landed", "met_begun", "met_queued")}
        out[str(way)] = {"bytes": reads["bytes"]} | met | foresight([run.receipt])
        out[str(way)]["bytes_ratio"] = round(reads["bytes"] / out[str(ways[0])]["bytes"], 4)
        print(f"depth {way}: {out[str(way)]}", flush=True)
    if len(hashes) > 1:
        raise EngineError("looking ahead changed a decision")
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--share", type=float, default=0.167, help="experts that have a slot")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--block", type=int, default=12, help="tokens before the next way's turn")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--ways", default="0,1,2", help="layers ahead; the first is compared with")
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="an engine per way, for bytes")
    args = parser.parse_args()
    ways = [int(way) for way in args.ways.split(",")]
    text = Text(args.prompt, args.block, args.rounds)
    slots = int(expert_bytes(args.model) * args.share)

    def open_engine(depth: int) -> LLM:
        return LLM(
            args.model, vram_budget=slots, ram_budget=0, threads=args.threads, address="local",
            ctx_size=text.tokens(len(ways)), prefetch_depth=depth, prefetch_budget=args.budget,
        )  # fmt: skip

    if args.whole:
        result = whole(open_engine, text, ways)
    else:
        with open_engine(max(ways)) as llm:
            result = by_turns(llm, text, ways)
    for way, figures in result.items():
        print(f"depth {way}: {figures}")
    print(json.dumps({"model": args.model.name, "share": args.share, "budget": args.budget,
                      "text": asdict(text), "ways": result}))  # fmt: skip


if __name__ == "__main__":
    main()
