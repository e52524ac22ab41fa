"""Models and tiles of the prompt's benchmark, and the kernels that it is going to need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from plain_blocks import F32, Q4_K, Q6_K

from fomoe.kernels.gpu import prompt, prompt_experts
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.matrices import ExpertLayout, Matrix
from fomoe.kernels.gpu.prompt import Chunk, Norm
from fomoe.kernels.gpu.prompt_experts import Experts, PairRows
from fomoe.kernels.gpu.prompt_tiles import AnyTile, FloatTile, Tile
from fomoe.kernels.gpu.rehearsal import Rehearsal
from fomoe.kernels.gpu.step import Rows

# By the type of the weights: first two that came close to the default, then the rest of a sweep.
DENSE_TILES: dict[int, tuple[AnyTile, ...]] = {
    Q4_K: (
        Tile(128, 64, 256),
        Tile(128, 128, 256),
        Tile(128, 64, 256, 1),
        Tile(128, 64, 256, 2, 256),
        Tile(64, 64, 128),
        Tile(64, 128, 256),
        Tile(128, 128, 512),
    ),
    Q6_K: (
        Tile(64, 128, 256),
        Tile(128, 64, 256, 1),
        Tile(128, 64, 256),
        Tile(64, 64, 128),
        Tile(64, 64, 256),
        Tile(128, 128, 256),
    ),
    F32: (
        FloatTile(64, 32, 512, (8, 4), 128),
        FloatTile(32, 32, 512, (4, 4), 128),
        FloatTile(128, 64, 256, (8, 8), 32),
        FloatTile(128, 64, 512, (8, 4), 64),
        FloatTile(64, 64, 256, (8, 8), 64),
        FloatTile(64, 64, 512, (8, 4), 64),
        FloatTile(64, 32, 256, (8, 4), 64),
        FloatTile(16, 32, 512, (4, 4), 256),
        FloatTile(16, 16, 256, (4, 4), 256),
    ),
}
# By the tokens of an expert, the nearest power of two.
EXPERT_TILES: dict[int, tuple[Tile, ...]] = {
    8: (Tile(128, 16, 256), Tile(64, 32, 128)),
    16: (Tile(64, 16, 128, 3), Tile(64, 32, 128)),
    32: (Tile(64, 64, 128), Tile(128, 32, 256)),
    64: (Tile(64, 64, 128), Tile(128, 64, 256)),
}
_SWEPT_EXPERT_TILES = (
    Tile(64, 16, 128, 3),
    Tile(128, 16, 256),
    Tile(64, 32, 128),
    Tile(128, 32, 256),
    Tile(64, 64, 128),
    Tile(64, 64, 256),
    Tile(128, 64, 256),
    Tile(128, 64, 256, 1),
    Tile(128, 48, 256),
)
_CLOSE = 2  # tiles besides the default without a sweep
_TRIED = ("qkv", "out", "alpha, beta", "router")  # the dense matrices with several tiles


class Dense(NamedTuple):
    """Matrices of one shape and type that share a launch."""

    rows: int
    cols: int
    type: int
    count: int = 1


@dataclass(frozen=True)
class Model:
    """One model's layer; `llama_tok_s` are whole prompts of `layers` layers, by tokens."""

    name: str
    dense: dict[str, Dense]
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
        "qkv": Dense(qkv, hidden, Q4_K),
        "z": Dense(z, hidden, Q4_K),
        "out": Dense(hidden, z, Q6_K),
        "alpha, beta": Dense(heads, hidden, F32, 2),
        "router": Dense(count, hidden, F32),
        "shared down": Dense(hidden, width, Q6_K),
    }
    return Model(name, dense, Experts(layout, count, top_k), width, layers, speeds)


MODELS = (
    model("35B", (2048, 8192, 4096, 32, 256, 512, 8), 12, {512: 28100.0, 2048: 31300.0}),
    model("397B", (4096, 12288, 8192, 64, 512, 1024, 10), 4, {512: 29600.0, 2048: 30300.0}),
)
TINY = (model("tiny", (256, 320, 256, 8, 6, 256, 2), 1, {21: 1.0, 40: 1.0}),)


def tiled(step: int, tokens: int, tiles: Sequence[AnyTile | None]) -> list[Chunk]:
    return [
        Chunk(step, tokens, True, None, tile)
        if isinstance(tile, FloatTile)
        else Chunk(step, tokens, True, tile)
        for tile in tiles
    ]


def fitting(
    gpu: GPU, tiles: Sequence[AnyTile], types: tuple[int, int], cols: int
) -> list[AnyTile | None]:
    """The default, which is None, and those of the tiles that a device has shared memory for."""
    limit = gpu.runtime.shared_bytes
    return [None, *(t for t in tiles if t.shared_bytes(types, cols) <= limit)]


def dense_tiles(gpu: GPU, model: Model, what: str, *, sweep: bool) -> list[AnyTile | None]:
    if what not in _TRIED:
        return [None]
    dense = model.dense[what]
    tiles = DENSE_TILES[dense.type][: None if sweep else _CLOSE]
    return fitting(gpu, tiles, (dense.type, dense.type), dense.cols)


def expert_tiles(gpu: GPU, model: Model, tokens: int, *, sweep: bool) -> list[AnyTile | None]:
    layout = model.experts.layout
    each = tokens * model.experts.top_k / model.experts.count
    near = min(EXPERT_TILES, key=lambda n: abs(n - each))
    tiles = _SWEPT_EXPERT_TILES if sweep else EXPERT_TILES[near]
    worst = max(layout.types)
    return fitting(gpu, tiles, (worst, worst), layout.hidden)


def kernels_of(
    gpu: GPU, model: Model, tokens: int, *, sweep: bool
) -> list[tuple[str, Mapping[str, int]]]:
    """What `measure` is going to compile."""
    at = Rehearsal(gpu)
    rows, layout = Rows(256, 256, 256), model.experts.layout
    for what, dense in model.dense.items():
        parts = [(Matrix(256, dense.type, dense.rows, dense.cols), 0)] * dense.count
        for chunk in tiled(0, tokens, dense_tiles(gpu, model, what, sweep=sweep)):
            prompt.matmuls(at, chunk, rows, parts)
    for chunk in tiled(0, tokens, expert_tiles(gpu, model, tokens, sweep=sweep)):
        lists = prompt_experts.pair_buffers(at, chunk, model.experts)
        prompt_experts.group_pairs(at, chunk, model.experts, 0, lists)
        room = PairRows(rows, 256)
        prompt_experts.experts_chunk(at, chunk, model.experts, lists, 0, rows, room)
    for n in (model.hidden, layout.width, model.dense["out"].cols):
        prompt.norm_rows(at, Chunk(0, tokens), 0, Norm(0, n, 1e-6), rows)
    matrix = Matrix(256, Q4_K, model.shared, model.hidden)
    prompt.swiglu(at, Chunk(0, tokens), rows, matrix, matrix, rows)
    return at.jobs
