"""Holds contracts on a text and measures what they were worth: bytes, and KL from exact.

Each window of the text starts afresh: its prompt goes through exactly, then the text itself is fed
token by token under the contract. KL(exact, answer) is taken at every token against a run that was
exact from the start, so it has in it what earlier substitutions did to the state; the shadow
steps' own estimate stands beside it. Bytes are logical: experts that were asked for and were not
among the `capacity` of a layer. Every expert is in memory, so nothing waits for a drive.

    python benchmarks/quality_contract.py TEXT --quality kl=0.01 --capacity 16 --tokens 20000
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fomoe.config import RoutingConfig, default_model
from fomoe.engine.experts import ResidentExperts
from fomoe.engine.forward import Forward
from fomoe.engine.generation import Generation
from fomoe.engine.local import sequence_logits
from fomoe.engine.meter import HostCounters, Meter
from fomoe.engine.requests import GenerateRequest, Receipt
from fomoe.engine.sequences import Sequence
from fomoe.engine.shadow import divergence
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.layers import DenseModel
from fomoe.model.tokenizer import Tokenizer
from fomoe.residency import LogicalRules
from fomoe.routing.price import NANO

CHUNK = 128
NEARLY_EXACT = "price=1e-6"  # reads what exact routing does, and counts it


class Bench:
    """A model in this process that feeds windows of text under contracts."""

    def __init__(self, path: Path, capacity: int, window: int, prompt: int) -> None:
        file = open_gguf(path)
        self.spec = read_spec(file)
        self.tokenizer = Tokenizer.from_gguf(file.metadata)
        model = DenseModel(file, self.spec, CHUNK, int8=True)
        experts = ResidentExperts(file, self.spec, CHUNK, int8=True, threads=1)
        self.forward = Forward(model, experts, prefetch=False)
        self.prompt = prompt
        self.window = window
        self.sequence = Sequence(self.spec, window, "f16", LogicalRules(capacity=capacity))
        self._plain = Sequence(self.spec, window, "f16", LogicalRules(capacity=capacity))

    def exact(self, ids: list[int]) -> np.ndarray:
        """Return the logits [T, V] of a window, all exact."""
        self._plain.reset()
        return sequence_logits(self.forward, self._plain, ids, CHUNK)

    def under(self, quality: str, ids: list[int], routing: RoutingConfig) -> Under:
        """Feed a window under a contract."""
        steps: list[np.ndarray] = []
        meter = Meter(HostCounters(), self.forward.brain.loss, self.forward.watch,
                      devices="none", capacity=self.sequence.logical.capacity)  # fmt: skip
        request = GenerateRequest(
            request_id="bench", prompt=ids[: self.prompt], max_tokens=len(ids) - self.prompt,
            forced=ids[self.prompt :], quality=quality,
        )  # fmt: skip
        run = Recorded(steps, request, self.sequence, self.forward, meter,
                       chunk=CHUNK, routing=routing)  # fmt: skip
        while not run.finished:
            events = run.step()
        return Under(np.stack(steps), run.prices, events[-1].receipt)


class Recorded(Generation):
    """A generation whose decode steps' logits and prices are kept."""

    def __init__(self, steps, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self._steps = steps
        self.prices: list[float] = []

    def _decode(self, token: int) -> np.ndarray:
        self.prices.append(self._contract.price)
        logits = super()._decode(token)
        self._steps.append(logits.copy())
        return logits


@dataclass(frozen=True, slots=True)
class Under:
    """A window under a contract: logits [steps, V], each step's price, the receipt."""

    logits: np.ndarray
    prices: list[float]
    receipt: Receipt


def read_text(path: Path, skip: int, size: int) -> str:
    """Return `size` characters of a text file, plain or .xz, from character `skip` on."""
    opened = lzma.open if path.suffix == ".xz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        file.read(skip)
        return file.read(size)


def windows(ids: list[int], size: int, tokens: int, prompt: int) -> Iterator[list[int]]:
    """Yield windows until `tokens` decode steps are covered."""
    steps = size - prompt - 1
    for start in range(0, len(ids) - size, size):
        if tokens <= 0:
            return
        tokens -= steps
        yield ids[start : start + size]


def measure(bench: Bench, ids: list[int], options: argparse.Namespace) -> dict[str, object]:
    """Return figures over all windows."""
    routing = RoutingConfig(shadow_every=options.shadow_every)
    kls, estimates, prices, started = [], [], [], time.perf_counter()
    receipts: list[Receipt] = []
    exact_bytes = 0
    for ids_ in windows(ids, options.window, options.tokens, options.prompt):
        exact = bench.exact(ids_)[options.prompt : -1]
        got = bench.under(options.quality, ids_, routing)
        kls.append([divergence(a, b) / NANO for a, b in zip(exact, got.logits, strict=True)])
        prices.append(got.prices)
        receipts.append(got.receipt)
        if got.receipt.estimated_kl is not None:
            estimates.append((got.receipt.shadow_kl, got.receipt.shadow_steps))
        if options.baseline:
            plain = bench.under(NEARLY_EXACT, ids_, replace(routing, shadow_every=0))
            exact_bytes += plain.receipt.logical_bytes
    kl = np.array(kls)
    n_bytes = sum(r.logical_bytes for r in receipts)
    per_window = kl.mean(axis=1)
    quarters = np.array_split(np.array(prices), 4, axis=1)
    shadow = np.array(estimates).sum(axis=0) if estimates else (0.0, 0)
    return {
        "quality": options.quality, "capacity": options.capacity, "tokens": int(kl.size),
        "windows": len(kl), "kl_mean": float(kl.mean()),
        "kl_se": float(per_window.std(ddof=1) / len(per_window) ** 0.5) if len(kl) > 1 else None,
        "kl_median": float(np.median(kl)), "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_by_quarter": [float(part.mean()) for part in np.array_split(kl, 4, axis=1)],
        "shadow_kl": float(shadow[0] / max(1, shadow[1])), "shadow_steps": int(shadow[1]),
        "price_by_quarter": [float(part.mean()) for part in quarters],
        "substituted": sum(r.substituted for r in receipts)
        / (kl.size * bench.spec.n_layers * bench.spec.moe.top_k),
        "bytes_per_token": n_bytes / kl.size,
        "exact_bytes_per_token": exact_bytes / kl.size,
        "bytes_saved": 1 - n_bytes / exact_bytes if exact_bytes else None,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def main() -> None:
    """Print the figures of one contract as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--quality", default="kl=0.01")
    parser.add_argument("--capacity", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--skip", type=int, default=0, help="characters of the text to leave out")
    parser.add_argument("--shadow-every", type=int, default=64)
    parser.add_argument("--no-baseline", dest="baseline", action="store_false")
    options = parser.parse_args()
    text = read_text(options.text, options.skip, options.tokens * 10)
    path = options.model or default_model()
    bench = Bench(path, options.capacity, options.window, options.prompt)
    print(json.dumps(measure(bench, bench.tokenizer.encode(text), options)))


if __name__ == "__main__":
    main()
