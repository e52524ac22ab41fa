"""Hit rates of a 397B-shaped model through the real actors: exact, and cache-aware at 0.35.

Sixty layers of 512 experts, ten per token, on two devices with 50 slots per layer and 36 slots of
RAM beside them: the sizes for which FOMOE publishes 60 % device, 12 % RAM and 28 % NVMe exact, and
7 % NVMe with its cache-aware routing. The model is synthetic and its experts are narrow, so that
it takes 1 GB: hit rates are those of its routing, whose law `synthetic/routing.py` states. The law
is fitted to popularity (FOMOE's own frequencies) and to published LRU hit rates of such models, 60,
72 and 81 % with 50, 86 and 128 slots (`--locality` prints what the file gives).

Run: python benchmarks/seed_numbers.py [--model FILE] [--warm 512] [--tokens 512]
Writes the model where FILE is missing. Shares come from `/metrics` while the requests run. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import uvicorn
from synthetic.locality import Locality, measure
from synthetic.model_file import Recipe, write_model
from synthetic.shapes import SHAPES
from synthetic.verify import trace

from fomoe.cli.serve import listen, server_info, url_of
from fomoe.config import ServerConfig
from fomoe.engine.requests import Finished, GenerateRequest, Receipt, SamplingParams
from fomoe.errors import EngineError
from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import open_gguf
from fomoe.llm import LLM
from fomoe.server.app import create_app

SHAPE = SHAPES["397b-narrow"]
# What the four-layer files add to the residual stream, spread over sixty layers: with 0.1 per
# sublayer the last layers would see more of their predecessors than of the text.
UPDATE = 0.1 * math.sqrt(4 / SHAPE.full_layers)
DEVICES, DEVICE_SLOTS, RAM_SLOTS = 2, 50, 36
TIERS = ("device", "ram", "nvme")
SAMPLE = re.compile(r'^(fomoe_\w+)(?:\{tier="(\w+)"\})? (\S+)$', re.MULTILINE)
NUMBERS = itertools.count()


@dataclass(frozen=True, slots=True)
class Totals:
    """Activations of generated tokens by tier: wanted experts that ran, and substitutes."""

    wanted: tuple[float, float, float]
    substitutes: tuple[float, float, float]

    @classmethod
    def scrape(cls, url: str) -> Totals:
        """Read them from a server's metrics."""
        text = httpx.get(f"{url}/metrics", timeout=30).text
        values = {(name, tier): float(value) for name, tier, value in SAMPLE.findall(text)}

        def row(name: str) -> tuple[float, float, float]:
            device, ram, nvme = (values[name, tier] for tier in TIERS)
            return device, ram, nvme

        return cls(row("fomoe_expert_lookups_total"), row("fomoe_substitutes_total"))

    def shares(self, before: Totals) -> dict[str, float]:
        """Return shares of all activations since `before`.

        A substitute is counted apart; `*_with_substitutes` counts it by the tier where it lay, as
        FOMOE does.
        """
        wanted = [b - a for a, b in zip(before.wanted, self.wanted, strict=True)]
        others = [b - a for a, b in zip(before.substitutes, self.substitutes, strict=True)]
        total = max(1.0, sum(wanted) + sum(others))
        shares = dict(zip(TIERS, (count / total for count in wanted), strict=True))
        shares["substituted"] = sum(others) / total
        for tier, a, b in zip(TIERS, wanted, others, strict=True):
            shares[f"{tier}_with_substitutes"] = (a + b) / total
        return {name: round(share, 4) for name, share in shares.items()}


def line(shares: dict[str, float]) -> str:
    """Return shares for people."""
    ours = "  ".join(f"{name} {shares[name]:.1%}" for name in (*TIERS, "substituted"))
    theirs = "/".join(f"{shares[f'{tier}_with_substitutes']:.1%}" for tier in TIERS)
    return f"{ours}   (substitutes by their tier: {theirs})"


class Watch:
    """Prints the shares of what runs, from `/metrics`, every few seconds."""

    def __init__(self, url: str, name: str, period_s: float) -> None:
        self.samples: list[dict[str, float]] = []
        self._url, self._name, self._period_s = url, name, period_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self.start = Totals.scrape(self._url)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.samples.append(Totals.scrape(self._url).shares(self.start))

    def _run(self) -> None:
        while not self._end.wait(self._period_s):
            shares = Totals.scrape(self._url).shares(self.start)
            if any(shares.values()):
                self.samples.append(shares)
                print(f"  {self._name} now: {line(shares)}", flush=True)


def slots_bytes(path: Path) -> tuple[int, int]:
    """Return the bytes of the device slots of one device and of all RAM slots."""
    table = ExpertTable.from_gguf(open_gguf(path), SHAPE.full_layers)
    every = sum(table.slot_bytes(layer) for layer in range(SHAPE.full_layers))
    mine = max(
        sum(table.slot_bytes(layer) for layer in range(device, SHAPE.full_layers, DEVICES))
        for device in range(DEVICES)
    )
    return mine * DEVICE_SLOTS, every * RAM_SLOTS


@contextmanager
def served(llm: LLM) -> Iterator[str]:
    """Serve an engine over HTTP as `fomoe serve` does; yields the URL."""
    with listen("127.0.0.1", 0) as sock:
        info = server_info(llm.file, ServerConfig())
        app = create_app(llm.engine, llm.tokenizer, llm.chat, info)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            yield url_of(sock)
        finally:
            server.should_exit = True
            thread.join(30)


def decode(llm: LLM, first: int, warm: int, tokens: int, car: float) -> Receipt:
    """Run ids `first`.. exactly as a prompt of `warm`, then `tokens` of them one by one."""
    request = GenerateRequest(
        request_id=f"seed-{next(NUMBERS)}", prompt=list(range(first, first + warm)),
        quality=f"car={car}" if car else "exact",
        max_tokens=tokens + 1, forced=list(range(first + warm, first + warm + tokens + 1)),
        sampling=SamplingParams(temperature=0.0),
    )  # fmt: skip
    for event in llm.engine.stream(request):
        if isinstance(event, Finished):
            if event.error is not None:
                raise EngineError(event.error)
            return event.receipt
    raise EngineError("the request ended without a receipt")


def locality(path: Path, warm: int, tokens: int) -> Locality:
    """Measure what caches of the usual sizes give on the file's own routing."""
    ids, _ = trace(path, list(range(warm + tokens)), threads=2)
    return measure(ids, SHAPE.experts, (50, 86, 128), warm)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("bench/397b-narrow.gguf"))
    parser.add_argument("--warm", type=int, default=512, help="tokens of the exact prompt before")
    parser.add_argument("--tokens", type=int, default=512, help="decoded tokens that count")
    parser.add_argument("--car", type=float, default=0.35)
    parser.add_argument("--period", type=float, default=5.0, help="seconds between two scrapes")
    parser.add_argument("--locality", action="store_true", help="measure the file's routing, too")
    args = parser.parse_args()
    if not args.model.exists():
        args.model.parent.mkdir(parents=True, exist_ok=True)
        write_model(args.model, Recipe(shape=SHAPE, layers=SHAPE.full_layers, update=UPDATE))
    result: dict[str, object] = {"model": args.model.name, "warm": args.warm, "tokens": args.tokens}
    if args.locality:
        found = locality(args.model, args.warm, args.tokens)
        result["locality"] = asdict(found)
        print(found.text())
    vram, ram = slots_bytes(args.model)
    with LLM(
        args.model, devices=["cpu"] * DEVICES, vram_budget=vram, ram_budget=ram,
        ctx_size=args.warm + args.tokens + 2, address="local",
    ) as llm, served(llm) as url:  # fmt: skip
        print(llm.plan_text())
        for number, (name, car) in enumerate((("exact", 0.0), ("car", args.car))):
            first = number * (args.warm + args.tokens + 1)
            began = time.monotonic()
            with Watch(url, name, args.period) as watch:
                receipt = decode(llm, first, args.warm, args.tokens, car)
            shares = watch.samples[-1]
            print(f"{name}: {line(shares)}")
            result[name] = {
                "shares": shares, "live": watch.samples, "mode": receipt.mode,
                "nvme_bytes": receipt.nvme_bytes, "decision_hash": receipt.decision_hash,
                "seconds": round(time.monotonic() - began, 1),
            }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
