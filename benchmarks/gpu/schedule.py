"""What a schedule of copies and layers hides: actors as they are, and a clock that plays a card.

Run: PYTHONPATH=.:tests python benchmarks/gpu/schedule.py [--devices 2] [--copy 3] [--layer 6]

No GPU. The engine is a real one, in threads; kernels and copies of its devices take given times and
copies share one link. Times are long beside Python's, so that the order of things shows and not
their cost. Routing is a random walk, `--sure` is how near guesses of the next layer are to it.
Hidden is (compute + copy - wall) / copy, where copies are those that crossed the link. `--trace N`
prints N tokens' schedule: when each part of an expert came (`on` a stream of one device), when each
half of a layer ended. `--fifo` lets residual streams and picks queue behind experts.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from support import cpu_layers
from support.cpu_runtime import CpuRuntime
from support.local_engine import local_engine, slot_bytes
from support.tiny_gguf import write_tiny

from fomoe.actors import layers
from fomoe.config import RoutingConfig
from fomoe.engine import hosting
from fomoe.engine.requests import GenerateRequest, SamplingParams, TokenEvent

EXPERTS, TOP_K, SKIP = 96, 10, 16
GATE_UP = 2 / 3  # of an expert's time, which need not wait for the others' bytes
Op = list[Any]  # kind, seconds left or event, turn, name


class Card:
    """Streams whose copies share a link; time passes when somebody looks."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.queues: dict[int, deque[Op]] = {}
        self.recorded: dict[int, int] = {}
        self.happened: dict[int, int] = {}
        self.at = time.perf_counter()
        self.busy = {"copy": 0.0, "kernel": 0.0}
        self.trace: list[tuple[float, str]] = []

    def look(self) -> None:
        """Let what should have happened by now happen."""
        now = time.perf_counter()
        while True:
            while sum(self._instant(queue) for queue in self.queues.values()):
                pass
            first = [queue[0] for queue in self.queues.values() if queue]
            heads = [op for op in first if op[0] in self.busy]
            share = {kind: sum(op[0] == kind for op in heads) for kind in self.busy}
            step = min([op[1] * share[op[0]] for op in heads], default=np.inf)
            passed = min(step, now - self.at)
            for op in heads:
                op[1] -= passed / share[op[0]]
            for kind in self.busy:
                self.busy[kind] += passed * (share[kind] > 0)
            self.at += passed
            if step > passed:
                self.at = now
                return

    def _instant(self, queue: deque[Op]) -> bool:
        if not queue:
            return False
        kind, what, turn, name = queue[0]
        if kind in self.busy:
            if what > 1e-9:
                return False
            self.trace.append((self.at, name + " ends"))
        elif kind == "wait" and self.happened[what] < turn:
            return False
        elif kind == "record":
            self.happened[what] = max(turn, self.happened[what])
        queue.popleft()
        return True

    def put(self, stream: int, op: Op) -> None:
        """Queue work."""
        with self.lock:
            self.look()
            self.queues[stream].append(op)


class CardRuntime(CpuRuntime):
    """One process's driver of a card; bytes move at once, their time passes on the card."""

    def __init__(self, card: Card, copy_s: float) -> None:
        super().__init__()
        self.card, self._copy_s = card, copy_s
        self.own: list[int] = []
        self.computes = self.stream()

    def stream(self) -> int:
        with self.card.lock:
            self.own.append(len(self.card.queues) + 1)
            self.card.queues[self.own[-1]] = deque()
            return self.own[-1]

    def event(self, timing: bool = False) -> int:
        with self.card.lock:
            event = len(self.card.recorded) + 1
            self.card.recorded[event] = self.card.happened[event] = 0
            return event

    def record(self, event: int, stream: int) -> None:
        self.card.recorded[event] += 1
        self.card.put(stream, ["record", event, self.card.recorded[event], ""])

    def wait(self, event: int, stream: int) -> None:
        self.card.put(stream, ["wait", event, self.card.recorded[event], ""])

    def done(self, event: int) -> bool:
        with self.card.lock:
            self.card.look()
            if self.card.happened[event] >= self.card.recorded[event]:
                return True
        time.sleep(1e-4)  # who asks again and again would keep the interpreter from the others
        return False

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        super().copy(to, source, nbytes, stream)
        self.card.put(stream, ["copy", self._copy_s / 3, 0, f"      part on {stream}"])

    def kernel(self, seconds: float, name: str) -> None:
        """Queue a kernel on the stream that computes."""
        self.card.put(self.computes, ["kernel", seconds, 0, name])


class Walk:
    """Scores that drift from token to token, and guesses near them."""

    def __init__(self, n_layers: int, keeps: float, sure: float) -> None:
        rng = np.random.default_rng(7)
        at = rng.normal(size=(n_layers, EXPERTS))
        self.scores, self.ahead, self.foreseen = [], [], []
        for _ in range(600):
            at = keeps * at + (1 - keeps**2) ** 0.5 * rng.normal(size=at.shape)
            self.scores.append((2 * at).astype(np.float32))
            for known, off in ((sure, self.ahead), ((1 + sure) / 2, self.foreseen)):
                near = known * at + (1 - known**2) ** 0.5 * rng.normal(size=at.shape)
                off.append((2 * near).astype(np.float32))


class CardLayers:
    """See `fomoe.actors.layer_device.LayerModel`: nothing but time."""

    fifo = False

    def __init__(
        self, spec: Any, options: Any, slots: Any, walk: Walk, runtime: Any, layer_s: float
    ) -> None:  # fmt: skip
        self.runtime, self.slots, self.stream = runtime, slots, runtime.computes
        self.spec, self.options, self._walk, self._half = spec, options, walk, layer_s / 2
        self._event, self._spoken = runtime.event(), runtime.event()
        self._foreseen = -1

    def begin(self, tokens: Any, position: int, state: int) -> None:
        self._position, self._count = position, len(tokens)

    def front(self, layer: int, *, gives_input: bool = False) -> None:
        self._layer = layer
        self.runtime.kernel(self._half, f"front {layer}")

    def _sync(self) -> None:
        self.runtime.record(self._event, self.stream)
        while not self.runtime.done(self._event):
            pass

    def take_hidden(self, address: int) -> None:
        self._sync()

    def scores(self, layer: int) -> Any:
        self._sync()
        return self._walk.scores[self._position][layer][None]

    def ahead(self) -> Any:
        if self._layer + 1 == self.spec.n_layers or not self.options.ahead:
            return None
        return self._walk.ahead[self._position][self._layer + 1][None]

    def embed(self) -> None:
        self._foresee(0)

    def _foresee(self, layer: int) -> None:
        if self.options.ahead and layer < self.spec.n_layers:
            self.runtime.record(self._spoken, self.stream)
            self._foreseen = layer

    def foreseen(self) -> Any:
        if self._foreseen < 0 or not self.runtime.done(self._spoken):
            return None
        layer, self._foreseen = self._foreseen, -1
        return layer, self._walk.foreseen[self._position][layer][None]

    def put_hidden(self, address: int) -> None:
        self._behind()

    def _behind(self) -> None:
        """A small copy takes its turn on the engine that copies experts."""
        if self.fifo:
            runtime = self.runtime
            for stream in runtime.own:
                event = runtime.event()
                runtime.record(event, stream)
                runtime.wait(event, self.stream)

    def back(self, layer: int, *rest: Any) -> None:
        self._behind()
        self.runtime.kernel(self._half, f"back {layer}")
        self._foresee(layer + 1)

    own_back = back

    def back_hits(self, layer: int, routes: Any, late: Any) -> None:
        self._behind()
        self._of_hits = GATE_UP * self._half * np.count_nonzero(~late) / late.size
        self.runtime.kernel(self._of_hits, f"hits {layer}")

    def back_late(self, layer: int) -> None:
        self.runtime.kernel(self._half - self._of_hits, f"back {layer}")
        self._foresee(layer + 1)

    def begin_and_front(self, tokens: Any, position: int, state: int) -> None:
        self.begin(tokens, position, state)
        self.embed()
        self.front(0)

    def back_and_front(self, layer: int, routes: Any) -> None:
        self.back(layer)
        self.front(layer + 1)

    def largest(self, row: int) -> tuple[int, float, float]:
        self._sync()
        return 5, 0.0, 0.0

    def logits(self, rows: Any) -> Any:
        self._sync()
        return np.zeros((len(rows), 288), np.float32)

    def __getattr__(self, name: str) -> Any:
        if name in ("reset", "close"):
            return lambda *args: None
        raise AttributeError(name)


def measure(args: argparse.Namespace, path: Path, share: float) -> dict[str, float]:
    """Run the text; returns milliseconds a token and what came of guesses."""
    card, walk = Card(), Walk(args.layers, args.keeps, args.sure)
    opened: list[CardLayers] = []

    def open_model(file: Any, spec: Any, config: Any, device: int, counts: Any) -> CardLayers:
        options = hosting.host_options(config, spec)[device]
        plain = cpu_layers.CpuLayers(file, spec, options, counts)
        runtime = CardRuntime(card, args.copy / 1e3)
        CardLayers.fifo = args.fifo
        opened.append(CardLayers(spec, options, plain.slots, walk, runtime, args.layer / 1e3))
        return opened[-1]

    layers.open_model, hosting.planned_bytes = open_model, cpu_layers.planned_bytes
    total, _ = slot_bytes(path)
    budget = cpu_layers.DENSE_BYTES + int(share * total) // args.devices
    with local_engine(
        path, devices=("hip:0",) * args.devices, vram=budget, ram=2 * total, ctx_size=1024,
        prefill_chunk=32, prefetch_budget=1.0, ram_policy="inclusive",
        routing=RoutingConfig(shadow_every=0),
    ) as engine:  # fmt: skip
        count = SKIP + args.tokens
        request = GenerateRequest(
            request_id="a", prompt=[3], max_tokens=count, forced=[5] * count,
            sampling=SamplingParams(temperature=0.0),
        )  # fmt: skip
        at, busy, receipt = [], [], None
        for event in engine.client.stream(request):
            if isinstance(event, TokenEvent):
                at.append(time.perf_counter())
                busy.append(dict(card.busy))
            else:
                receipt = getattr(event, "receipt", receipt)
                assert getattr(event, "error", None) is None, event
        assert receipt is not None
        for when, name in sorted(t for t in card.trace if at[-1 - args.trace] < t[0] <= at[-1]):
            print(f"  {1e3 * (when - at[-1 - args.trace]):8.2f} {name}")
        found = 1e3 * (at[-1] - at[SKIP]) / (len(at) - 1 - SKIP)
        each = {k: 1e3 * (busy[-1][k] - busy[SKIP][k]) / (len(at) - 1 - SKIP) for k in card.busy}
        activations = receipt.hits_device + receipt.hits_ram + receipt.reads_nvme
        return {
            "wall": found, "compute": each["kernel"], "copy": each["copy"],
            "hits": receipt.hits_device / activations,
            "wall / max": found / max(each.values()),
            "hidden": (sum(each.values()) - found) / max(each["copy"], 1e-9),
            "wanted copies": receipt.hits_ram / count,
            "copies": each["copy"] / args.copy,
        }  # fmt: skip


def main() -> None:
    """Print a line of figures, in milliseconds of the played clock."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--copy", type=float, default=3.0, help="ms of an expert, alone")
    parser.add_argument("--layer", type=float, default=6.0, help="ms of a layer")
    parser.add_argument("--keeps", type=float, default=0.9)
    parser.add_argument("--sure", type=float, default=0.99)
    parser.add_argument("--share", type=float, default=0.15, help="of experts in VRAM")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--fifo", action="store_true", help="small things are copies, too")
    parser.add_argument("--trace", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny(
            Path(folder) / "m.gguf", layers=args.layers, experts=EXPERTS, top_k=TOP_K, quant="Q4_K",
            vocab=288, attention_interval=2,
        )  # fmt: skip
        found = measure(args, path, args.share)
    print("  ".join(f"{name} {value:.2f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
