"""Sequence kernels on a GPU at the shapes of the 397B and the 35B model.

Run: python benchmarks/gpu/sequence.py [--device cuda:0] [--only delta,attend,...] [--shapes 35b]
[--contexts 64,512] [--late]. Calls of a graph start early, as those of a model do: a call's time is
less than its length by what it does beside the one before; with --late it is not.
Prints a JSON object per line: microseconds of the device per call, medians, from graphs of many
calls whose states rotate over more memory than caches hold; `share` is bytes read + written per
second over the copy bandwidth of the same run. An empty node of a graph is in `node_us`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from bandwidth import copy_bandwidth
from device_time import device_ms, ticks_launch
from side_by_side import rehearse

from fomoe.kernels.gpu import sequence
from fomoe.kernels.gpu.attention import attend_plan
from fomoe.kernels.gpu.delta import head_parts
from fomoe.kernels.gpu.gpu import GPU, open_gpu
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.state import StateLayout, channels
from fomoe.kernels.gpu.step import STEP, Rows
from fomoe.model.spec import AttentionSpec, DeltaSpec

ARENA_BYTES = 8 << 30
ROTATE_BYTES = 600 << 20
EPS = 1e-6
VOCAB = 248_320
PROMPTS = (512, 2048)
CONTEXTS = (64, 512, 1024, 4096, 32_768, 131_072)


@dataclass(frozen=True)
class Shape:
    """Layers of a model."""

    name: str
    delta: DeltaSpec
    attention: AttentionSpec
    hidden: int
    experts: tuple[int, int]


def _attention(heads: int) -> AttentionSpec:
    return AttentionSpec(n_heads=heads, n_kv_heads=2, head_dim=256, rope_dims=64, rope_base=1e7)


def _delta(heads: int) -> DeltaSpec:
    return DeltaSpec(n_k_heads=16, n_v_heads=heads, key_dim=128, value_dim=128, conv_width=4)


SHAPES = {
    "397b": Shape("397b", _delta(64), _attention(32), 4096, (512, 10)),
    "35b": Shape("35b", _delta(32), _attention(16), 2048, (256, 8)),
}


class Table(NamedTuple):
    address: int
    type: int
    cols: int


class Bench:
    """Random tensors in the memory of a GPU, and the time of launches."""

    def __init__(self, gpu: GPU, contexts: Sequence[int], *, early: bool) -> None:
        self.gpu, self.contexts = gpu, contexts
        self._early = early
        self.bandwidth = copy_bandwidth(gpu)
        self._noise = np.random.default_rng(1).standard_normal(1 << 20, dtype=np.float32)
        empty = ticks_launch(gpu, 0)
        self.node_us = self.per_call_us([[empty]] * 200)

    def floats(self, *shape: int) -> int:
        """Address of random float32."""
        count = int(np.prod(shape))
        address = self.gpu.arena.take(4 * count)
        self.gpu.upload(address, np.resize(self._noise, count))
        return address

    def room(self, nbytes: int) -> int:
        """Address of zeros."""
        address = self.gpu.arena.take(nbytes)
        self.gpu.runtime.fill(address, 0, nbytes, self.gpu.stream)
        return address

    def rows(self, tokens: int, n: int) -> Rows:
        """Where int8 rows go."""
        return Rows(0, self.room(tokens * n), self.room(tokens * n // 4))

    def step(self, state: int = 0, position: int = 0, tokens: int = 1) -> int:
        """Address of a step block."""
        address = self.gpu.arena.take(STEP.itemsize)
        self.gpu.upload(address, np.array((0, position, tokens, 0, state), STEP))
        return address

    def per_call_us(self, calls: list[list[Launch]]) -> float:
        """Median microseconds of a call, all of them in one graph."""
        runtime = self.gpu.runtime
        runtime.begin_capture(self.gpu.stream)
        for launches in calls:
            for launch in launches:
                launch.early = launch.early and self._early
                self.gpu.launch(launch)
        graph = runtime.end_capture(self.gpu.stream)

        def work() -> None:
            runtime.run(graph, self.gpu.stream)

        device_ms(self.gpu, work, 3)
        return statistics.median(device_ms(self.gpu, work, 15)) * 1e3 / len(calls)

    def show(self, what: str, us: float, nbytes: int = 0, **more: object) -> None:
        """Print one line."""
        line: dict[str, object] = {"what": what, "us": round(us, 2), **more}
        if nbytes:
            line["share"] = round(nbytes / (us * 1e-6) / self.bandwidth, 3)
        print(json.dumps(line), flush=True)

    def delta_call(self, spec: DeltaSpec, tokens: int, place: sequence.DeltaPlace):
        """Random weights and inputs of a DeltaNet layer."""
        n = spec.n_v_heads
        weights = sequence.DeltaWeights(
            self.floats(channels(spec), spec.conv_width), self.room(4 * n), self.room(4 * n),
            self.floats(spec.value_dim), EPS,
        )  # fmt: skip
        inputs = sequence.DeltaInputs(
            self.floats(tokens, channels(spec)), self.floats(tokens, spec.inner),
            self.floats(tokens, n), self.floats(tokens, n),
        )  # fmt: skip
        return sequence.DeltaCall(weights, inputs, place, self.rows(tokens, spec.inner))

    def attend_call(self, spec: AttentionSpec, tokens: int, place: sequence.KVPlace):
        """Random weights and inputs of an attention layer."""
        turns = sequence.rope_turns(spec)
        at = self.gpu.arena.take(turns.nbytes)
        self.gpu.upload(at, turns)
        d, kv = spec.head_dim, spec.n_kv_heads
        weights = sequence.AttendWeights(self.floats(d), self.floats(d), at, EPS)
        inputs = sequence.AttendInputs(
            self.floats(tokens, spec.n_heads, 2, d), self.floats(tokens, kv, d),
            self.floats(tokens, kv, d),
        )  # fmt: skip
        return sequence.AttendCall(weights, inputs, place, self.rows(tokens, spec.n_heads * d))


def states(bench: Bench, nbytes: int, most: int = 64) -> Iterator[int]:
    """Addresses of enough states that none is still in a cache when its turn comes."""
    for _ in range(max(4, min(most, ROTATE_BYTES // nbytes))):
        yield bench.room(nbytes)


def delta(bench: Bench, shape: Shape) -> None:
    spec = shape.delta
    layout = StateLayout.of(("delta",), spec, shape.attention, 32, "f16")
    call = bench.delta_call(spec, 1, layout.layers[0])
    steps = [bench.step(state, position=9) for state in states(bench, layout.nbytes)]
    moved = 2 * 4 * spec.n_v_heads * spec.key_dim * spec.value_dim
    usual = head_parts(spec, bench.gpu.runtime)
    for parts in dict.fromkeys([usual, 1, 2]):
        calls = [[sequence.delta(bench.gpu, step, spec, call, parts)] for step in steps]
        us = bench.per_call_us(calls)
        bench.show(f"{shape.name} delta", us, moved, parts=parts, usual=parts == usual)


def attend(bench: Bench, shape: Shape) -> None:
    spec = shape.attention
    for length in bench.contexts:
        with_room = length + 64
        layout = StateLayout.of(("attention",), shape.delta, spec, with_room, "f16")
        call = bench.attend_call(spec, 1, layout.layers[0])
        steps = [bench.step(s, position=length - 1) for s in states(bench, layout.nbytes)]
        moved = 2 * 2 * spec.n_kv_heads * spec.head_dim * length
        usual = attend_plan(spec, layout.layers[0], bench.gpu.runtime)
        plans = dict.fromkeys([usual, *other_plans(spec, bench.gpu.runtime.cores)])

        def made(steps=steps, call=call, plans=plans) -> list[list[list[Launch]]]:
            return [
                [[sequence.attend(bench.gpu, step, spec, call, plan)] for step in steps]
                for plan in plans
            ]

        bench.gpu.prepare(rehearse(bench.gpu, made)[0])
        for plan, calls in zip(plans, made(), strict=True):
            us = bench.per_call_us(calls)
            bench.show(f"{shape.name} attend {length}", us, moved, plan=plan, usual=plan == usual)


def other_plans(spec: AttentionSpec, cores: int) -> list[sequence.AttendPlan]:
    """Plans with more and fewer heads and tiles of a group; half, one and two groups a core."""
    shared = spec.n_heads // spec.n_kv_heads
    sizes = [
        (n, min(128, max(1, round(fill * cores * n / spec.n_heads))), ahead)
        for n, ahead in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (8, 1))
        for fill in (0.5, 1, 2)
        if shared % n == 0
    ]
    return [sequence.AttendPlan(*size) for size in sizes]


def delta_chunk(bench: Bench, shape: Shape) -> None:
    spec = shape.delta
    layout = StateLayout.of(("delta",), spec, shape.attention, 32, "f16")
    for tokens in PROMPTS:
        call = bench.delta_call(spec, tokens, layout.layers[0])
        scratch = bench.room(sequence.delta_scratch_bytes(spec, tokens))
        step = bench.step(bench.room(layout.nbytes), position=9, tokens=tokens)
        launches = sequence.delta_chunk(bench.gpu, step, spec, call, (tokens, scratch))
        names = ("inputs", "scan", "finish")
        parts = {
            n: round(bench.per_call_us([[one]] * 3), 1)
            for n, one in zip(names, launches, strict=True)
        }
        bench.show(f"{shape.name} delta_chunk {tokens}", bench.per_call_us([launches] * 3), **parts)


def attend_chunk(bench: Bench, shape: Shape) -> None:
    spec = shape.attention
    for tokens in PROMPTS:
        for position in (0, 8192):
            layout = StateLayout.of(("attention",), shape.delta, spec, position + tokens, "f16")
            call = bench.attend_call(spec, tokens, layout.layers[0])
            scratch = bench.room(sequence.attend_scratch_bytes(spec, tokens))
            step = bench.step(bench.room(layout.nbytes), position=position, tokens=tokens)
            launches = sequence.attend_chunk(bench.gpu, step, spec, call, (tokens, scratch))
            us = bench.per_call_us([launches] * 3)
            products = 4 * spec.n_heads * spec.head_dim * tokens * (position + tokens / 2)
            rate = round(products / us * 1e-6, 1)
            what = f"{shape.name} attend_chunk {tokens} after {position}"
            bench.show(
                what, us, inputs=round(bench.per_call_us([launches[:1]] * 3), 1), tflops=rate
            )


def small(bench: Bench, shape: Shape) -> None:
    """Embedding, top-k, the largest logit."""
    gpu, many = bench.gpu, 64
    logits, out = bench.floats(VOCAB), bench.room(64)
    largest = sequence.largest(gpu, logits, VOCAB, out)
    bench.show(f"{shape.name} largest", bench.per_call_us([[largest]] * many), 4 * VOCAB)
    experts, top_k = shape.experts
    tokens = 512
    step, scores = bench.step(tokens=tokens), bench.floats(tokens, experts)
    ids = bench.room(4 * tokens * top_k), bench.room(4 * tokens * top_k)
    choose = sequence.choose_rows(gpu, step, (tokens, experts, top_k), scores, ids)
    bench.show(f"{shape.name} choose_rows {tokens}", bench.per_call_us([[choose]] * many))
    one = sequence.choose_rows(gpu, bench.step(), (1, experts, top_k), scores, ids)
    bench.show(f"{shape.name} choose_rows 1", bench.per_call_us([[one]] * many))
    table = Table(bench.floats(64, shape.hidden), 12, shape.hidden)
    embed = sequence.embed(gpu, bench.step(), table, bench.room(4 * shape.hidden))
    bench.show(f"{shape.name} embed Q4_K", bench.per_call_us([[embed]] * many))


PARTS: dict[str, Callable[[Bench, Shape], None]] = {
    "small": small,
    "delta": delta,
    "attend": attend,
    "delta_chunk": delta_chunk,
    "attend_chunk": attend_chunk,
}


def main() -> None:
    """Measure what is asked for; each part gets a device of its own, so that memory suffices."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--late", action="store_true", help="no launch starts before its turn")
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    args = parser.parse_args()
    contexts = [int(length) for length in args.contexts.split(",")]
    for part in args.only.split(","):
        for name in args.shapes.split(","):
            gpu = open_gpu(args.device, ARENA_BYTES)
            bench = Bench(gpu, contexts, early=not args.late)
            rates = {"copy_GBs": round(bench.bandwidth / 1e9), "node_us": round(bench.node_us, 2)}
            print(json.dumps({"part": part, "cores": gpu.runtime.cores, **rates}), flush=True)
            PARTS[part](bench, SHAPES[name])
            gpu.close()


if __name__ == "__main__":
    main()
