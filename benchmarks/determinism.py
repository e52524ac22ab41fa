"""Runs that may differ in speed only: random read delays, 1 to 3 devices, other tier splits.

Each run starts the actors afresh on Ray, as processes, on a machine drawn by its number: devices,
slots of device and RAM, RAM policy, eviction, chunks, look-ahead, and a delay for each read. Text,
log probabilities, decision hash, price and loss of every request must equal those of a run that
holds all experts and delays nothing. `--car-capacity` is the same everywhere, as a promise needs.

Run: python benchmarks/determinism.py [MODEL] [--runs 20] [--tokens 48]
The last line is JSON; the status is 1 where anything differed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fomoe.actors.cluster import Cluster, FomoeStorage
from fomoe.actors.launch import RunningEngine
from fomoe.actors.storage import StoragePlan
from fomoe.config import Budgets, EngineConfig, RoutingConfig, default_model
from fomoe.engine.plan import resolve
from fomoe.engine.requests import Finished, GenerateRequest, SamplingParams, TokenEvent
from fomoe.errors import EngineError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.tokenizer import Tokenizer
from fomoe.storage.fetch import Fetch
from fomoe.storage.segment import SegmentHandle

NUMBERS = itertools.count()
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "car": {"quality": "car=0.35"},
    "sampled": {"quality": "car=0.6", "sampling": SamplingParams(temperature=0.9, seed=7)},
    "price": {"quality": "price=0.05"},
    "bytes": {"quality": "bytes=300KB/token"},
    "kl": {"quality": "kl=0.02"},
}
PROMPT = "Once upon a time, in a village by the sea, there lived an old fisherman who"
SLOWEST_S, SLOW_SHARE = 0.004, 0.4


class SlowStorage(FomoeStorage):
    """A storage actor whose reads take a random time more; the seed is the process's own."""

    def open(
        self, plan: StoragePlan, delay: Callable[[Fetch], float] | None = None
    ) -> SegmentHandle:
        """Open with delays."""
        rng = random.Random(time.time_ns())

        def slow(_fetch: Fetch) -> float:
            return rng.uniform(0, SLOWEST_S) if rng.random() < SLOW_SHARE else 0.0

        return super().open(plan, delay or slow)


class Lab:
    """One model, many machines, on one Ray."""

    def __init__(self, path: Path, capacity: int, tokens: int) -> None:
        self._file = open_gguf(path)
        self._spec = read_spec(self._file)
        self._table = ExpertTable.from_gguf(self._file, self._spec.n_layers)
        self._prompt = Tokenizer.from_gguf(self._file.metadata).encode(PROMPT)
        self._path, self._capacity, self._tokens = path, capacity, tokens
        self._cluster = Cluster("local")
        self._fast = self._cluster.classes["storage"]
        layers = range(self._spec.n_layers)
        self._total = sum(self._table.slot_bytes(i) for i in layers) * self._spec.moe.n_experts

    def machine(self, number: int) -> dict[str, Any]:
        """Draw a run's machine; number 0 holds everything."""
        if number == 0:
            return {"budgets": Budgets(vram_bytes=self._total, ram_bytes=0)}
        rng, devices = random.Random(number), 1 + number % 3
        device, ram = rng.uniform(0.1, 0.3), rng.choice([0.0, rng.uniform(0.05, 0.2)])
        return {
            "devices": ("cpu",) * devices,
            "budgets": Budgets(
                vram_bytes=int(self._total * device) // devices, ram_bytes=int(self._total * ram)
            ),
            "ram_policy": rng.choice(["exclusive", "inclusive"]),
            "eviction": rng.choice(["lfru", "lru"]),
            "prefill_chunk": rng.choice([8, 64, 256]),
            "read_threads": rng.randint(1, 4),
            "prefetch_depth": number % 2 + 1,
            "prefetch_budget": rng.choice([0.05, 1.0]),
        }

    @contextmanager
    def engine(self, number: int) -> Iterator[RunningEngine]:
        """Start a run's actors."""
        self._cluster.classes["storage"] = SlowStorage if number else self._fast
        config = EngineConfig(
            model=self._path, ctx_size=512, threads=1,
            routing=RoutingConfig(car_capacity=self._capacity), **self.machine(number),
        )  # fmt: skip
        config = resolve(config, self._table, self._spec, self._total)
        running = self._cluster.launch(self._file, self._spec, config, f"fixed-{number}")
        try:
            yield running
        finally:
            running.stop()

    def run(self, number: int) -> tuple[dict[str, Any], dict[str, float]]:
        """Return what each mode told, and how different the run was."""
        told: dict[str, Any] = {}
        cost = {"devices": float(1 + number % 3 if number else 1), "nvme": 0.0, "stall_ms": 0.0}
        cost |= {"prefetched": 0.0, "used": 0.0}
        with self.engine(number) as engine:
            for mode, fields in MODES.items():
                told[mode], receipt = self._ask(engine, fields)
                cost["nvme"] += receipt.reads_nvme
                cost["stall_ms"] += round(receipt.stall_ms, 1)
                cost["prefetched"] += receipt.prefetched
                cost["used"] += receipt.prefetched_used
        return told, cost

    def _ask(self, engine: RunningEngine, fields: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        values = {"sampling": SamplingParams(temperature=0.0)} | fields
        request = GenerateRequest(
            request_id=f"fixed-{next(NUMBERS)}", prompt=self._prompt, max_tokens=self._tokens,
            logprobs=4, **values,
        )  # fmt: skip
        tokens = []
        for event in engine.client.stream(request):
            if isinstance(event, TokenEvent):
                tokens.append([event.token, event.logprob, event.top])
            elif isinstance(event, Finished):
                if event.error is not None:
                    raise EngineError(event.error)
                receipt = event.receipt
                return {
                    "tokens": tokens, "hash": receipt.decision_hash,
                    "substituted": receipt.substituted, "lost_mass": receipt.lost_mass,
                    "price": receipt.price, "shadow_kl": receipt.shadow_kl,
                    "logical_bytes": receipt.logical_bytes,
                }, receipt  # fmt: skip
        raise EngineError("the request ended without a receipt")

    def close(self) -> None:
        """End Ray."""
        self._cluster.close()


def main() -> None:
    """Run and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=None)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--car-capacity", type=int, default=12)
    args = parser.parse_args()
    lab = Lab(args.model or default_model(), args.car_capacity, args.tokens)
    different, costs = [], []
    try:
        want, _ = lab.run(0)
        print("  ".join(f"{mode}: {told['hash']}" for mode, told in want.items()), flush=True)
        for number in range(1, args.runs + 1):
            told, cost = lab.run(number)
            wrong = [mode for mode in MODES if told[mode] != want[mode]]
            different += [(number, mode) for mode in wrong]
            costs.append(cost)
            print(f"{number}: {'DIFFERENT in ' + str(wrong) if wrong else 'equal'}  {cost}",
                  flush=True)  # fmt: skip
    finally:
        lab.close()
    hashes = {mode: told["hash"] for mode, told in want.items()}
    substituted = {mode: told["substituted"] for mode, told in want.items()}
    print(json.dumps({"runs": args.runs, "different": different, "hashes": hashes,
                      "substituted": substituted, "costs": costs}))  # fmt: skip
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
