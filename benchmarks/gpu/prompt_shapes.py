"""Models and tiles of the prompt's benchmark, and the kernels that it is going to need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from plain_blocks import F32, Q4_K, Q6_K

from fomoe.kernels.gpu import prompt, prompt_experts
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.matrices import ExpertLayout, Matrix
from fomoe.kernels.gpu.prompt import Chunk, Norm
from fomoe.kernels.gpu.prompt_experts import Experts, PairRows
from fomoe.kernels.gpu.prompt_tiles import Tile
from fomoe.kernels.gpu.step import Rows

DENSE_TILES = (
    Tile(128, 64, 256, 2, 128),
    Tile(128, 64, 256, 1, 128),
    Tile(128, 64, 256, 2, 256),
    Tile(64, 64, 128, 2, 128),
    Tile(64, 128, 256, 2, 128),
    Tile(128, 128, 256, 2, 128),
    Tile(128, 128, 512, 2, 128),
)
EXPERT_TILES = (
    Tile(64, 16, 128, 3, 128),
    Tile(128, 16, 256, 2, 128),
    Tile(64, 32, 128, 2, 128),
    Tile(128, 32, 256, 2, 128),
    Tile(64, 64, 256, 2, 128),
    Tile(128, 64, 256, 2, 128),
)


@dataclass(frozen=True)
class Model:
    """One model's layer; `llama_tok_s` are whole prompts of `layers` layers, by tokens."""

    name: str
    dense: dict[str, tuple[int, int, int]]  # rows, cols, type
    experts: Experts
    shared: int
    layers: int
    llama_tok_s: dict[int, float]

    @property
    def hidden(self) -> int:
        return self.experts.layout.hidden


def model(name: str, sizes: tuple[int, ...], layers: int, speeds: dict[int, float]) -> Model:
    hidden, qkv, z, heads, count, width, top_k = sizes
    layout = ExpertLayout((Q4_K, Q4_K, Q6_K), hidden, width)
    dense = {
        "qkv": (qkv, hidden, Q4_K),
        "z": (z, hidden, Q4_K),
        "out": (hidden, z, Q6_K),
        "alpha": (heads, hidden, F32),
        "beta": (heads, hidden, F32),
        "router": (count, hidden, F32),
        "shared down": (hidden, width, Q6_K),
    }
    return Model(name, dense, Experts(layout, count, top_k), width, layers, speeds)


MODELS = (
    model("35B", (2048, 8192, 4096, 32, 256, 512, 8), 12, {512: 28100.0, 2048: 31300.0}),
    model("397B", (4096, 12288, 8192, 64, 512, 1024, 10), 4, {512: 29600.0, 2048: 30300.0}),
)
TINY = (model("tiny", (256, 320, 256, 8, 6, 256, 2), 1, {21: 1.0, 40: 1.0}),)


class Recorder:
    """Stands for a GPU while builders say which kernels they want; hands out no memory."""

    def __init__(self, gpu: GPU) -> None:
        self.runtime, self.arena, self.stream = self, self, gpu.stream
        self.shared_bytes, self.wave = gpu.runtime.shared_bytes, gpu.runtime.wave
        self.jobs: list[tuple[str, dict[str, int]]] = []

    def kernel(self, unit: str, name: str, defines: dict[str, int]) -> int:
        self.jobs.append((unit, dict(defines)))
        return 0

    def take(self, nbytes: int, align: int = 256) -> int:
        return 256

    def fill(self, *args: int) -> None:
        pass


def tiled(step: int, tokens: int, tiles: Sequence[Tile | None]) -> list[Chunk]:
    return [Chunk(step, tokens, True, tile) for tile in tiles]


def fitting(
    gpu: GPU, tiles: Sequence[Tile], types: tuple[int, int], cols: int
) -> list[Tile | None]:
    limit = gpu.runtime.shared_bytes
    return [None, *(t for t in tiles if t.shared_bytes(types, cols, True) <= limit)]


def kernels_of(gpu: GPU, model: Model, tokens: int) -> list[tuple[str, dict[str, int]]]:
    """What `measure` is going to compile."""
    recorder: Any = Recorder(gpu)
    rows, layout = Rows(256, 256, 256), model.experts.layout

    def both(chunks: Sequence[Chunk], build: Callable[[Chunk], object]) -> None:
        for chunk in chunks:
            build(chunk)

    for what, (n_rows, cols, qtype) in model.dense.items():
        tiles: list[Tile | None] = [None]
        if what in ("qkv", "out"):
            tiles = fitting(gpu, DENSE_TILES, (qtype, qtype), cols)
        matrix = Matrix(256, qtype, n_rows, cols)
        both(tiled(0, tokens, tiles), lambda c: prompt.matmul(recorder, c, rows, matrix, 0))  # noqa: B023
    worst_type = (max(layout.types), max(layout.types))

    def experts(chunk: Chunk) -> None:
        lists = prompt_experts.pair_buffers(recorder, chunk, model.experts)
        prompt_experts.group_pairs(recorder, chunk, model.experts, 0, lists)
        room = PairRows(rows, 256)
        prompt_experts.experts_chunk(recorder, chunk, model.experts, lists, 0, rows, room)

    both(tiled(0, tokens, fitting(gpu, EXPERT_TILES, worst_type, layout.hidden)), experts)
    for n in (model.hidden, layout.width, model.dense["out"][1]):
        prompt.norm_rows(recorder, Chunk(0, tokens), 0, Norm(0, n, 1e-6), rows)
    matrix = Matrix(256, Q4_K, model.shared, model.hidden)
    prompt.swiglu(recorder, Chunk(0, tokens), rows, matrix, matrix, rows)
    return recorder.jobs
