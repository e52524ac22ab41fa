"""Microseconds of Python between scores and the next launch, part by part, without a GPU.

Run: PYTHONPATH=.:tests python benchmarks/gpu/host_time.py [--share 0.2] [--quality price=0.000001]

One real engine over the stand-in of the vendors' libraries, its driver and its device taken in turn
by one thread; launches and copies do nothing and scores are drawn. Times are of a steady
layer; what the vendors' library takes for a call is not in them.

| part   | from -> to                                                    |
| decide | the scores have come -> the step is sent                      |
| between | the last layer is done -> the next token's first step is sent |
| after  | -> the driver has nothing to do but wait                      |
| order  | begins a step's copies, each                                  |
| arrive | the step has come -> first launch                             |
| queue  | -> all is queued                                              |
| answer | the device is done -> its answer is sent                      |
| rest   | -> it looks for the next message                              |
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from support.emulated_gpu import install_standin
from support.local_engine import local_engine, slot_bytes
from support.tiny_gguf import write_tiny

from fomoe.config import EngineConfig, RoutingConfig
from fomoe.engine.generation import Generation
from fomoe.engine.hosting import dense_bytes
from fomoe.engine.requests import GenerateRequest, SamplingParams
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec

LAYERS, EXPERTS, TOP_K, SKIP = 4, 512, 10, 20
ns = time.perf_counter_ns


class Turns:
    """Gives the device its turn where the driver would wait, and notes when what happened."""

    def __init__(self, driver: Any, device: Any, seed: int = 7) -> None:
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.driver, self.device = driver, device
        self.model, self.host = device._model, driver._hands.host
        self.at = 0  # of the last thing that mattered
        self.rng = np.random.default_rng(seed)
        self.walk = self.rng.normal(size=(LAYERS, EXPERTS))
        self._stub_runtime(self.model.runtime)
        self._wrap_driver()
        self._wrap_device()

    def _stub_runtime(self, runtime: Any) -> None:
        def launched(*args: Any) -> None:
            if not self.launches:
                self._note("arrive")
            self.launches += 1

        self.launches = 0
        runtime.run = runtime.launch = launched
        runtime.copy = runtime.record = runtime.wait = lambda *args: None
        runtime.done = self._done

    def _done(self, event: int) -> bool:
        if self.launches and not self.is_done:
            self._note("queue")
            self.is_done = True
            self.at = ns()
        return True

    def _note(self, part: str) -> None:
        now = ns()
        self.parts[part].append((now - self.at) / 1e3)
        self.at = now

    def _wrap_driver(self) -> None:
        link, calls, host = self.host.links[0], self.host._calls, self.host
        send, scores, finish = link.sender.send, host.scores, host.finish
        self.decides = self.is_between = False

        def sent(*args: Any) -> None:
            send(*args)
            if self.decides and args[0] == 12:
                self._note("between" if self.is_between else "decide")
                self.decides = self.is_between = False

        def scored(layer: int) -> Any:
            if layer:
                self._note("after")
            found = scores(layer)
            self.decides, self.at = layer > 0, ns()
            return found

        def pump(bell: int, *args: Any) -> bool:
            self.turn()
            return True

        def finished() -> None:
            self._note("after")
            finish()
            self.decides = self.is_between = True
            self.at = ns()

        link.sender.send = sent
        host.scores, host.finish = scored, finished
        calls._fabric.wait = pump

    def _wrap_device(self) -> None:
        device = self.device
        send, order = device._to_driver.send, device._copies.order

        def answered(*args: Any) -> None:
            send(*args)
            if args[0] == 4 and self.is_done:
                self._note("answer")

        def ordered(records: Any, step: int = 0) -> None:
            begun = ns()
            order(records, step)
            self.parts["order"].append((ns() - begun) / 1e3 / len(records))
            self.at += ns() - begun

        device._to_driver.send = answered
        device._copies.order = ordered
        device.fabric.wait = lambda *args: True

    def turn(self) -> None:
        """The device serves what it has."""
        self.walk = 0.98 * self.walk + 0.2 * self.rng.normal(size=self.walk.shape)
        scores = (3 * self.walk).astype(np.float32)
        layer = self.rng.integers(LAYERS)
        self.model._mail.scores.host[0] = scores[layer]
        self.model._mail.ahead.host[0] = scores[(layer + 1) % LAYERS]
        self.launches, self.is_done = 0, False
        while True:
            self.at = ns()
            if not self.device._poll() or self.launches:
                break
        if self.is_done:
            self._note("rest")


def dense_of(path: Path) -> int:
    """Return what the device needs before any expert."""
    file = open_gguf(path)
    config = EngineConfig(model=path, devices=("hip:0",), ctx_size=1024, prefill_chunk=1)
    return max(dense_bytes(file, read_spec(file), config))


def measure(args: argparse.Namespace, path: Path) -> dict[str, list[float]]:
    """Run the text; returns microseconds by part."""
    total, _ = slot_bytes(path)
    with local_engine(
        path, devices=("hip:0",), ctx_size=1024, prefill_chunk=1, prefetch_budget=1.0,
        vram=dense_of(path) + int(args.share * total) + (1 << 20), ram=2 * total,
        ram_policy="inclusive", routing=RoutingConfig(shadow_every=0),
    ) as engine:  # fmt: skip
        driver = engine.handles["driver"].actor
        device = engine.handles["gpu-0"].actor
        driver._loop.stop()
        device._loop.stop()
        device._loop._stopping.clear()
        turns = Turns(driver, device)
        count = SKIP + args.tokens
        request = GenerateRequest(
            request_id="a", prompt=[3], max_tokens=count, forced=[5] * count,
            sampling=SamplingParams(temperature=0.0), quality=args.quality,
        )  # fmt: skip
        running = Generation(
            request, driver._sequence, driver._forward, driver._meter, chunk=1,
            routing=driver._config.routing,
        )  # fmt: skip
        driver._running, driver._client._sender.send = running, lambda *args: None
        for token in range(count):
            if token == SKIP:
                turns.parts.clear()
            driver.poll()
        return turns.parts


def main() -> None:
    """Print a line for each part."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--share", type=float, default=1.0, help="of experts in VRAM")
    parser.add_argument("--quality", default="price=0.000001")
    parser.add_argument("--tokens", type=int, default=300)
    args = parser.parse_args()
    install_standin()
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny(
            Path(folder) / "m.gguf", layers=LAYERS, experts=EXPERTS, top_k=TOP_K, quant="Q8_0",
            vocab=288, hidden=64, expert_width=32, attention_interval=2,
        )  # fmt: skip
        for part, times in measure(args, path).items():
            best = statistics.quantiles(times, n=20)[0]
            middle = statistics.median(times)
            print(f"{part:8} {len(times):6}  median {middle:6.1f}  5% {best:6.1f}")


if __name__ == "__main__":
    main()
