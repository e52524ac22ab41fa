"""Speed of attention, the delta rule, float products and norms at the shapes of large models.

Run: python benchmarks/cpu_sequence.py [--threads 6] [--isa avx2] [--seconds 0.5]. Shapes are those
of Qwen3.5-35B-A3B and 397B-A17B, for a tile of a prompt (256 tokens) and for one token. Products
are in billions of multiply-adds a second, caches and states in GB/s read (a state is written as
well), the rest in microseconds a token. With one thread its own processor time is counted, so that
other work on the machine disturbs less. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from fomoe.gguf.quants import GGMLType, row_bytes
from fomoe.kernels.cpu import ops

F32 = npt.NDArray[np.float32]
TILE = 256
STATES = 24  # of one token: together larger than caches


@dataclass(frozen=True)
class Shape:
    """The sizes that the operations of a model's layers depend on."""

    name: str
    hidden: int
    experts: int
    heads: int
    value_heads: int
    kv_heads: int = 2
    head_dim: int = 256
    key_heads: int = 16
    key_dim: int = 128

    @property
    def channels(self) -> int:
        """Width of the convolution."""
        return (2 * self.key_heads + self.value_heads) * self.key_dim


SHAPES = (Shape("35b-a3b", 2048, 256, 16, 32), Shape("397b-a17b", 4096, 512, 32, 64))


@dataclass(frozen=True)
class Measure:
    """A call, the work it does in units of `unit`; per token where `unit` is us."""

    name: str
    unit: str
    amount: float
    call: Callable[[], None]

    def speed(self, seconds: float, clock: Callable[[], float]) -> float:
        """The best of the calls that fit into `seconds`, after one to warm up."""
        self.call()
        fastest, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = clock()
            self.call()
            fastest = min(fastest, clock() - start)
        return fastest * 1e6 / self.amount if self.unit == "us" else self.amount / fastest / 1e9


def random(rng: np.random.Generator, *shape: int) -> F32:
    """Normal float32 values."""
    return rng.standard_normal(shape, dtype=np.float32)


def attention(rng: np.random.Generator, s: Shape) -> Iterator[Measure]:
    """A tile at the beginning and behind 1792 positions; one token behind 2k and 32k."""
    for tokens, first in ((TILE, 0), (TILE, 1792), (1, 2047), (1, 32767)):
        q = random(rng, tokens, s.heads, s.head_dim)
        size = (first + tokens, s.kv_heads, s.head_dim)
        k, v = (random(rng, *size).astype(np.float16) for _ in range(2))
        out = np.empty_like(q)
        seen = tokens * first + tokens * (tokens + 1) // 2
        amount = 2 * seen * s.heads * s.head_dim if tokens > 1 else k.nbytes + v.nbytes

        call = partial(ops.attention, q, k, v, first, out)
        unit = "Gmac/s" if tokens > 1 else "GB/s"
        yield Measure(f"attention T={tokens} at {first}", unit, amount, call)


def each_state(step: Callable[[F32, F32], None], states: F32, out: F32) -> None:
    """One call per state."""
    for state in states:
        step(state, out)


def delta(rng: np.random.Generator, s: Shape) -> Iterator[Measure]:
    """The delta rule for a tile and for one token of many states."""
    for tokens in (TILE, 1):
        values = s.value_heads * s.key_dim
        qkv, out = random(rng, tokens, s.channels), np.empty((tokens, values), np.float32)
        alpha, beta = (random(rng, tokens, s.value_heads) for _ in range(2))
        decay, bias = -np.abs(random(rng, s.value_heads)), random(rng, s.value_heads)
        count = 1 if tokens > 1 else STATES
        states = random(rng, count, s.value_heads, s.key_dim, s.key_dim)
        sizes = (s.key_heads, s.value_heads, s.key_dim, s.key_dim)

        step = partial(ops.deltanet, qkv, alpha, beta, decay, bias, *sizes, 1e-6)
        call = partial(each_state, step, states, out)
        if tokens > 1:
            yield Measure(f"delta rule T={tokens}", "us", tokens, call)
        else:
            yield Measure(f"delta rule T={tokens}", "GB/s", states.nbytes, call)


def router(rng: np.random.Generator, s: Shape) -> Iterator[Measure]:
    """The router's float32 product."""
    width = row_bytes(GGMLType.F32, s.hidden)
    weights = random(rng, s.experts, s.hidden).view(np.uint8).reshape(s.experts, width)
    for tokens in (TILE, 8, 1):
        x, out = random(rng, tokens, s.hidden), np.empty((tokens, s.experts), np.float32)

        call = partial(ops.matmul_f32, int(GGMLType.F32), weights, x, out)
        amount = weights.nbytes if tokens == 1 else tokens * s.experts * s.hidden
        yield Measure(f"router T={tokens}", "GB/s" if tokens == 1 else "Gmac/s", amount, call)


def elementwise(rng: np.random.Generator, s: Shape) -> Iterator[Measure]:
    """What is done once per value of a token."""
    for tokens in (TILE, 1):
        x, y, out = (random(rng, tokens, s.hidden) for _ in range(3))
        weight, scale = random(rng, s.hidden), np.empty((tokens, s.hidden // 32), np.float32)
        q = np.empty(x.shape, np.int8)
        mixed, mixed_out = (random(rng, tokens, s.channels) for _ in range(2))
        taps, past = random(rng, s.channels, 4), random(rng, 3, s.channels)
        inner, gate = (random(rng, tokens, s.value_heads * s.key_dim) for _ in range(2))
        head_weight = random(rng, s.key_dim)
        calls = {
            "rms_norm": partial(ops.rms_norm, x, weight, 1e-6, out),
            "quantize": partial(ops.quantize_activations, x, q, scale),
            "silu_mul": partial(ops.silu_mul, x, y, out),
            "add": partial(ops.add, out, x),
            "conv_silu": partial(ops.conv_silu, mixed, taps, past, mixed_out),
            "gated_norm": partial(ops.gated_rms_norm, inner, gate, head_weight, 1e-6, inner),
        }
        for name, call in calls.items():
            yield Measure(f"{name} T={tokens}", "us", tokens, call)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default=ops.isa())
    parser.add_argument("--seconds", type=float, default=0.5)
    args = parser.parse_args()
    ops.use_isa(args.isa)
    ops.set_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    table: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        speeds = table[shape.name] = {}
        for group in (attention, delta, router, elementwise):
            for measure in group(np.random.default_rng(0), shape):
                key = f"{measure.name} {measure.unit}"
                speeds[key] = speed = measure.speed(args.seconds, clock)
                print(f"{shape.name:10s} {measure.name:24s} {speed:8.2f} {measure.unit}")
    print(json.dumps({"isa": args.isa, "threads": args.threads, "shapes": table}))


if __name__ == "__main__":
    main()
