"""The prompt's products at the shapes of two models: time, TFLOP/s, share of the copy bandwidth.

Run: python benchmarks/gpu/prompt.py [--device cuda:0] [--json FILE]. Besides the default tile two
that come close are measured, with `--sweep` all; `--tiny` runs small shapes on the CPU stand-in of
the tests. Weights are random blocks, Q4_K and Q6_K as in common files; dense matrices rotate over
more bytes than a cache has. Every result is checked on samples against NumPy. The last lines
compare a layer's products with what llama.cpp's CUDA build takes for a whole layer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bandwidth import copy_bandwidth
from device_time import device_ms
from plain_blocks import F32, Q4_K, random_rows, values_of
from prompt_shapes import MODELS, TINY, Model, dense_tiles, expert_tiles, kernels_of, tiled

from fomoe.kernels.gpu import prompt, prompt_experts
from fomoe.kernels.gpu.gpu import GPU, open_gpu
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.matrices import Matrix
from fomoe.kernels.gpu.prompt import Chunk, Norm
from fomoe.kernels.gpu.prompt_experts import PairRows, Shared
from fomoe.kernels.gpu.prompt_tiles import FloatTile
from fomoe.kernels.gpu.step import STEP, Rows

Work = tuple[float, float]  # floating point operations, bytes moved
ROTATE_BYTES = 160 << 20
ROUNDS = 5
DISTINCT = 4  # experts whose bytes differ
SAMPLES = 6


@dataclass(frozen=True)
class Line:
    """One measurement; `error` is the largest difference over the largest value of a sample."""

    model: str
    tokens: int
    product: str
    tile: str
    us: float
    tflops: float
    share: float
    error: float

    def __str__(self) -> str:
        return (
            f"{self.model:5} {self.tokens:5} {self.product:14} {self.tile:22} {self.us:9.1f} us "
            f"{self.tflops:7.1f} TFLOP/s  {self.share:5.2f} of copy  error {self.error:.1e}"
        )


def name_of(chunk: Chunk) -> str:
    tile = chunk.float_tile or chunk.tile
    if tile is None:
        return "default"
    shape = f"{tile.rows}x{tile.tokens} t{tile.threads}"
    if isinstance(tile, FloatTile):
        return f"{shape} m{tile.micro[0]}x{tile.micro[1]} k{tile.step}"
    return f"{shape} s{tile.stages} p{tile.part}"


def worst(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


class Bench:
    """A model's weights and activations on a device, and what is measured with them."""

    def __init__(self, gpu: GPU, model: Model, copy_bytes_s: float) -> None:
        self.gpu, self.model, self.copy_bytes_s = gpu, model, copy_bytes_s
        self.rng = np.random.default_rng(1)
        self.lines: list[Line] = []

    def time_us(self, launches: Sequence[Launch]) -> float:
        """Median microseconds of one of several launches in a graph."""
        runtime, stream = self.gpu.runtime, self.gpu.stream
        runtime.begin_capture(stream)
        for launch in launches:
            self.gpu.launch(launch)
        graph = runtime.end_capture(stream)
        device_ms(self.gpu, lambda: runtime.run(graph, stream), 1)
        times = device_ms(self.gpu, lambda: runtime.run(graph, stream), ROUNDS)
        runtime.drop(graph)
        return statistics.median(times) * 1e3 / len(launches)

    def add(
        self, chunk: Chunk, what: str, us: float, work: tuple[float, float], error: float
    ) -> None:
        """Add a line; `work` are floating point operations and bytes moved."""
        flops, nbytes = work
        share = nbytes / (us * 1e-6) / self.copy_bytes_s
        tile = name_of(chunk)
        line = Line(self.model.name, chunk.tokens, what, tile, us, flops / us * 1e-6, share, error)
        self.lines.append(line)
        print(line, flush=True)

    def array(self, array: Any) -> int:
        address = self.gpu.arena.take(array.nbytes)
        self.gpu.upload(address, array)
        return address

    def room(self, tokens: int, n: int) -> Rows:
        take = self.gpu.arena.take
        return Rows(take(4 * tokens * n), take(tokens * n), take(tokens * n // 4))

    # -- norms and dense products
    def rows(self, chunk: Chunk, n: int) -> Rows:
        """Random rows in all forms, made and timed by norm_rows."""
        x = self.array(self.rng.standard_normal((chunk.tokens, n), np.float32))
        norm = Norm(self.array(np.ones(n, np.float32)), n, 1e-6)
        rows = self.room(chunk.tokens, n)
        launch = prompt.norm_rows(self.gpu, chunk, x, norm, rows)
        us = self.time_us([launch] * 4)
        self.gpu.launch(launch)
        self.add(chunk, f"norm {n}", us, (0, chunk.tokens * n * 9.25), 0.0)
        return rows

    def lines_at(self, address: int, dtype: Any, picked: Any, n: int) -> Any:
        """Some lines of an array with n values a line."""
        nbytes = n * np.dtype(dtype).itemsize
        return np.stack([self.gpu.download(address + int(i) * nbytes, dtype, n) for i in picked])

    def restored(self, rows: Rows, picked: Any, n: int, is_int8: bool) -> Any:
        """The values of some rows as a product takes them, float64."""
        if not is_int8:
            return self.lines_at(rows.x, np.float32, picked, n).astype(np.float64)
        q = self.lines_at(rows.q, np.int8, picked, n).astype(np.float64)
        s = self.lines_at(rows.s, np.float32, picked, n // 16)[:, ::2]
        return q * np.repeat(s.astype(np.float64), 32, axis=1)

    def dense(self, chunks: Sequence[Chunk], what: str, rows: Rows) -> None:
        """Dense matrices that share a launch, with each chunk's tile; the last one is checked."""
        gpu, (n_rows, cols, qtype, count) = self.gpu, self.model.dense[what]
        blocks = random_rows(self.rng, qtype, n_rows, cols)
        copies = min(16, -(-ROTATE_BYTES // blocks.nbytes)) if chunks[0].tokens > 64 else 2
        tokens = chunks[0].tokens
        outs = [gpu.arena.take(4 * tokens * n_rows) for _ in range(count)]
        sets = [
            [(Matrix(self.array(blocks), qtype, n_rows, cols), out) for out in outs]
            for _ in range(copies)
        ]
        tested, picked = np.arange(0, n_rows, max(1, n_rows // 40)), self.picked(tokens)
        x = self.restored(rows, picked, cols, qtype != F32)
        expected = x @ values_of(qtype, blocks[tested]).T
        moved = count * (blocks.nbytes + 4 * tokens * n_rows) + tokens * cols
        work = (2.0 * count * tokens * n_rows * cols, moved)
        for chunk in chunks:
            launches = [m for parts in sets for m in prompt.matmuls(gpu, chunk, rows, parts)]
            us = self.time_us(launches)
            found = self.lines_at(outs[-1], np.float32, picked, n_rows)[:, tested]
            self.add(chunk, what, us, work, worst(found, expected))

    def picked(self, tokens: int) -> Any:
        return np.unique(np.linspace(0, tokens - 1, SAMPLES).astype(int))

    # -- experts
    def place_experts(self) -> int:
        """All experts of a layer, most of them copies of a few; returns the table's address."""
        layout, count = self.model.experts.layout, self.model.experts.count
        self.blocks = [
            [
                random_rows(self.rng, qtype, rows, cols)
                for qtype, rows, cols in zip(layout.types, *self.expert_shapes(), strict=True)
            ]
            for _ in range(DISTINCT)
        ]
        self.values = [
            [values_of(t, b) for t, b in zip(layout.types, blocks, strict=True)]
            for blocks in self.blocks
        ]
        stride = -(-layout.nbytes // 256) * 256
        base = self.gpu.arena.take(stride * count)
        for e in range(count):
            if e < DISTINCT:
                for offset, part in zip(layout.offsets, self.blocks[e], strict=True):
                    self.gpu.upload(base + e * stride + offset, part)
            else:
                source = base + e % DISTINCT * stride
                self.gpu.runtime.copy(base + e * stride, source, layout.nbytes, self.gpu.stream)
        offsets = np.array(layout.offsets, np.uint64)[:, None]
        return self.array(base + stride * np.arange(count, dtype=np.uint64) + offsets)

    def expert_shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        hidden, width = self.model.hidden, self.model.experts.layout.width
        return (width, width, hidden), (hidden, hidden, width)

    def experts(self, chunks: Sequence[Chunk], table: int, h: Rows) -> None:
        """Grouping, both products and the weighted sums, with each chunk's tile."""
        gpu, shape, tokens = self.gpu, self.model.experts, chunks[0].tokens
        layout, pairs = shape.layout, tokens * shape.top_k
        scores = self.rng.random((tokens, shape.count))
        ids = np.sort(np.argsort(scores, axis=1)[:, : shape.top_k], axis=1).astype(np.int32)
        ids_at = self.array(ids)
        rows = PairRows(self.room(pairs, layout.width), gpu.arena.take(4 * pairs * layout.hidden))
        weight_bytes = np.array(layout.part_bytes) * len(np.unique(ids))
        flops = 2.0 * pairs * layout.width * layout.hidden
        for chunk in chunks:
            lists = prompt_experts.pair_buffers(gpu, chunk, shape)
            grouping = prompt_experts.group_pairs(gpu, chunk, shape, ids_at, lists)
            self.add(chunk, "group", 2 * self.time_us(grouping), (0, 0), 0.0)
            made = prompt_experts.experts_chunk(gpu, chunk, shape, lists, table, h, rows)
            into_us, out_us = (self.time_us([launch] * 3) for launch in made)
            errors = self.expert_errors(ids, lists, h, rows)
            moved = weight_bytes[:2].sum() + pairs * (layout.hidden + layout.width)
            self.add(chunk, "experts in", into_us, (2 * flops, moved), errors[0])
            moved = weight_bytes[2] + pairs * (layout.width + 4 * layout.hidden)
            self.add(chunk, "experts out", out_us, (flops, moved), errors[1])
        self.combine(chunks[0], lists, rows)

    def expert_errors(self, ids: Any, lists: Any, h: Rows, rows: PairRows) -> tuple[float, float]:
        """Differences of a few pairs' rows before and after down; the first are rounded to int8."""
        layout, gpu, n = self.model.experts.layout, self.gpu, ids.size
        token_of = gpu.download(lists.lists.token_of, np.int32, n)
        expert_of = np.sort(ids.reshape(-1))  # pairs are sorted by expert
        picked = self.picked(n)
        x = self.restored(h, token_of[picked], layout.hidden, True)
        inner = self.restored(rows.hidden, picked, layout.width, True)
        outer = self.lines_at(rows.out, np.float32, picked, layout.hidden)
        errors = []
        for i, expert in enumerate(expert_of[picked]):
            gate, up, down = self.values[expert % DISTINCT]
            g, u = gate @ x[i], up @ x[i]
            errors.append(
                (worst(inner[i], g / (1 + np.exp(-g)) * u), worst(outer[i], down @ inner[i]))
            )
        firsts, seconds = zip(*errors, strict=True)
        return max(firsts), max(seconds)

    def combine(self, chunk: Chunk, lists: Any, rows: PairRows) -> None:
        tokens, hidden, shape = chunk.tokens, self.model.hidden, self.model.experts
        weights = self.array(self.rng.random((tokens, shape.top_k), np.float32))
        shared = Shared(self.room(tokens, hidden).x, self.array(np.zeros(tokens, np.float32)))
        x = self.array(np.zeros((tokens, hidden), np.float32))
        self.gpu.runtime.fill(shared.out, 0, 4 * tokens * hidden, self.gpu.stream)
        launch = prompt_experts.combine(
            self.gpu, chunk, shape, lists, (weights, rows.out), shared, x
        )
        moved = 4.0 * tokens * hidden * (shape.top_k + 3)
        self.add(chunk, "combine", self.time_us([launch] * 3), (0, moved), 0.0)

    def shared_expert(self, chunk: Chunk, h: Rows) -> None:
        """Gate and up of the shared expert, and the logit of its scale."""
        gpu, width, hidden = self.gpu, self.model.shared, self.model.hidden
        blocks = [random_rows(self.rng, Q4_K, width, hidden) for _ in range(2)]
        gate, up = (Matrix(self.array(b), Q4_K, width, hidden) for b in blocks)
        out = self.room(chunk.tokens, width)
        us = self.time_us([prompt.swiglu(gpu, chunk, h, gate, up, out)] * 3)
        picked = self.picked(chunk.tokens)
        x = self.restored(h, picked, hidden, True)
        g, u = (x @ values_of(Q4_K, b).T for b in blocks)
        found = self.restored(out, picked, width, True)
        work = (4.0 * chunk.tokens * width * hidden, 2 * blocks[0].nbytes)
        self.add(chunk, "shared in", us, work, worst(found, g / (1 + np.exp(-g)) * u))
        logits = gpu.arena.take(4 * chunk.tokens)
        vector = self.array(np.ones(hidden, np.float32))
        us = self.time_us([prompt.dot_rows(gpu, chunk, h, vector, hidden, logits)] * 3)
        self.add(chunk, "shared scale", us, (0, 4 * chunk.tokens * hidden), 0.0)


def measure(bench: Bench, tokens: int, step: int, table: int, *, sweep: bool) -> None:
    """All products of one model over so many tokens; tiles are tried on the largest."""
    gpu, model = bench.gpu, bench.model
    layout, plain = model.experts.layout, tiled(step, tokens, [None])
    h, inner = bench.rows(plain[0], model.hidden), bench.rows(plain[0], layout.width)
    heads = bench.rows(plain[0], model.dense["out"].cols)
    for what in model.dense:
        tiles = dense_tiles(gpu, model, what, sweep=sweep)
        rows = {"out": heads, "shared down": inner}.get(what, h)
        bench.dense(tiled(step, tokens, tiles), what, rows)
    bench.shared_expert(plain[0], h)
    tiles = expert_tiles(gpu, model, tokens, sweep=sweep)
    bench.experts(tiled(step, tokens, tiles), table, h)


def best(lines: Sequence[Line]) -> Iterator[Line]:
    """The fastest line of each product; both products of the experts with one number of tokens."""
    products = dict.fromkeys(line.product for line in lines)
    for product in products:
        yield min((line for line in lines if line.product == product), key=lambda line: line.us)


def summary(model: Model, lines: Sequence[Line]) -> list[str]:
    out = []
    for tokens, speed in model.llama_tok_s.items():
        mine = [line for line in lines if line.tokens == tokens]
        default = sum(line.us for line in mine if line.tile == "default")
        fastest = sum(line.us for line in best(mine))
        layer = tokens / speed / model.layers * 1e6
        out.append(
            f"{model.name} {tokens} tokens: a layer's products {default:.0f} us (best tiles "
            f"{fastest:.0f} us); llama.cpp's whole layer {layer:.0f} us"
        )
    return out


def run(gpu: GPU, models: Sequence[Model], arena_note: str, *, sweep: bool) -> list[Line]:
    start = time.monotonic()
    shapes = [(m, tokens) for m in models for tokens in m.llama_tok_s]
    jobs = [job for m, tokens in shapes for job in kernels_of(gpu, m, tokens, sweep=sweep)]
    gpu.prepare(jobs)
    print(f"{len(jobs)} kernels ready after {time.monotonic() - start:.1f} s; {arena_note}")
    copy = copy_bandwidth(gpu, 1 << 30 if models is MODELS else 1 << 20, 5)
    print(f"copy {copy / 1e9:.0f} GB/s")
    lines, notes = [], []
    for m in models:
        bench = Bench(gpu, m, copy)
        table = bench.place_experts()
        for tokens in m.llama_tok_s:
            step = bench.array(np.array([(0, 0, tokens, 0, 0)], STEP))
            measure(bench, tokens, step, table, sweep=sweep)
        lines += bench.lines
        notes += summary(m, bench.lines)
    print("\n".join([*notes, f"{time.monotonic() - start:.1f} s in all"]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--sweep", action="store_true", help="try all tiles, not the best few")
    args = parser.parse_args()
    if args.tiny:
        sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
        from support.emulated_gpu import install_standin

        install_standin()
    arena = 64 << 20 if args.tiny else 32 << 30
    gpu = open_gpu("hip:0" if args.tiny else args.device, arena)
    models = TINY if args.tiny else MODELS
    lines = run(gpu, models, f"arena {arena >> 20} MiB", sweep=args.sweep)
    gpu.close()
    if args.json:
        args.json.write_text(json.dumps([asdict(line) for line in lines], indent=1))
    bad = [line for line in lines if line.error > 2e-2]
    if bad:
        raise SystemExit(f"{len(bad)} products are wrong, the first: {bad[0]}")


if __name__ == "__main__":
    main()
