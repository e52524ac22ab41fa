"""Attention layers on a GPU: one token in one launch, a prompt's tokens in two."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fomoe.kernels.gpu.arguments import check, divisor, pointers, rows_out, zeros_at
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.runtime import Runtime
from fomoe.kernels.gpu.state import TILE, AttentionShape, KVPlace
from fomoe.kernels.gpu.step import Rows

# Contexts from which on more query heads of a group read the same keys. For short ones few heads
# are best: their sums are short, and their parts are soon put together.
_LONG_CTX = {1: 2, 1 << 14: 8}
# From here on two groups of a core hide each other's waits, unless one has heads enough for that.
_DOUBLE_CTX, _MANY_ROWS = 1 << 14, 8
_CHUNK_ROWS = 16  # query vectors of a group in float32
_TILE_ROWS, _TILE_WAVES = 16, 4  # query vectors of a wave on matrix units, waves of a group
MOST_SPLITS = 128  # parts of a context


class AttendWeights(NamedTuple):
    """Addresses of the norms of queries and keys, float32 [head_dim], and of `rope_turns`.

    `eps` belongs to the norms.
    """

    q_norm: int
    k_norm: int
    turns: int
    eps: float


class AttendInputs(NamedTuple):
    """Addresses of float32 projections.

    `q` [T, heads, 2, head_dim] is each head's query and gate; `k`, `v` [T, kv heads, head_dim].
    """

    q: int
    k: int
    v: int


class AttendCall(NamedTuple):
    """What a layer computes with: weights, inputs, its place in the state, and where rows go."""

    weights: AttendWeights
    inputs: AttendInputs
    place: KVPlace
    out: Rows


class AttendPlan(NamedTuple):
    """How decode is split: `rows` query heads of a group, at most `splits` of the positions.

    `ahead` tiles of a group's positions are on their way at a time, in registers: 1 or 2.
    """

    rows: int
    splits: int
    ahead: int = 1


def rope_turns(spec: AttentionShape) -> npt.NDArray[np.uint64]:
    """Return the turn per position of each rotated pair in 2^-64 of a turn, [rope_dims / 2].

    Pair i turns by base^(-2 i / rope_dims) radians per position (Su et al., arXiv:2104.09864).
    """
    pairs = range(spec.rope_dims // 2)
    radians = (spec.rope_base ** (-2.0 * i / spec.rope_dims) for i in pairs)
    return np.array([round(r / (2 * math.pi) * 2.0**64) for r in radians], np.uint64)


def attend_plan(spec: AttentionShape, place: KVPlace, runtime: Runtime) -> AttendPlan:
    """Return the plan for a device and the contexts that `place` has room for."""
    shared = spec.n_heads // spec.n_kv_heads
    most = max(rows for ctx, rows in _LONG_CTX.items() if place.ctx >= ctx)
    rows = divisor(shared, most if place.kv_dtype == "f16" else 2)  # floats fill the registers
    fill = 2 if place.ctx >= _DOUBLE_CTX and rows < _MANY_ROWS else 1
    splits = fill * _filling(spec, rows, runtime.cores)
    tiles = -(-place.ctx // TILE)
    return AttendPlan(rows, min(splits, MOST_SPLITS, tiles), _most_ahead(place, rows, runtime))


def _most_ahead(place: KVPlace, rows: int, runtime: Runtime) -> int:
    """Tiles that registers have room for: two of float16 and few rows, but not on AMD's cards."""
    roomy = not runtime.target.startswith("gfx") and place.kv_dtype == "f16" and rows <= 2
    return 2 if roomy else 1


def _filling(spec: AttentionShape, rows: int, cores: int) -> int:
    """Splits that give each core one group."""
    return max(1, cores * rows // spec.n_heads)


def attend(
    gpu: GPU, step: int, spec: AttentionShape, call: AttendCall, plan: AttendPlan | None = None
) -> Launch:
    """Return the launch of one token: norms, rotation, cache, attention, gate, rows [H * head_dim].

    `step` is the address of the step block.

    Raises:
        DeviceError: sizes that the kernel does not take.
    """
    rows, splits, ahead = plan or attend_plan(spec, call.place, gpu.runtime)
    shared = spec.n_heads // spec.n_kv_heads
    most = _most_ahead(call.place, rows, gpu.runtime)
    check(
        (shared % rows == 0, f"{rows} of {shared} query heads of a kv head a group: not a divisor"),
        (1 <= splits <= MOST_SPLITS, f"{splits} splits: from 1 to {MOST_SPLITS}"),
        (1 <= ahead <= most, f"{ahead} tiles of {rows} rows ahead: registers have room for {most}"),
    )
    few = min(splits, _filling(spec, rows, gpu.runtime.cores))
    split = {"ROWS": rows, "SPLITS": splits, "FEW": few, "AHEAD": ahead}
    defines = {**_sizes(spec, call.place), **split}
    function = gpu.kernel("attend", "attend", defines)
    subsets = spec.n_heads // rows
    parts = gpu.arena.take(4 * subsets * splits * rows * (spec.head_dim + 2))
    args = [
        step,
        call.place.keys,
        call.place.values,
        pointers(*call.weights[:3]),
        pointers(*call.inputs),
        ctypes.c_float(call.weights.eps),
        pointers(parts, zeros_at(gpu, 4 * subsets)),
        rows_out(call.out, spec.head_dim),
    ]
    return Launch(function, (subsets, splits), defines["THREADS"], 0, args, early=True)


def attend_scratch_bytes(spec: AttentionShape, tokens: int) -> int:
    """Return the bytes that `attend_chunk` needs between its launches for up to `tokens` tokens."""
    return 4 * (tokens * spec.n_heads + _TILE_ROWS) * spec.head_dim


def attend_chunk(
    gpu: GPU, step: int, spec: AttentionShape, call: AttendCall, chunk: tuple[int, int],
    *, half: bool = True,
) -> list[Launch]:  # fmt: skip
    """Return the launches for the step block's T tokens, which see the cache and each other.

    `chunk` is the largest T and the address of `attend_scratch_bytes` bytes. With `half`, a cache
    of f16 and heads of whole 32 values, the products are those of matrix units: queries and weights
    are rounded to half, sums are float32. Otherwise all but the cache is float32.

    Raises:
        DeviceError: sizes that the kernels do not take.
    """
    tokens, queries = chunk
    sizes, place = _sizes(spec, call.place), call.place
    tiles = int(half and place.kv_dtype == "f16" and spec.head_dim % 32 == 0)
    threads = sizes["THREADS"]
    inputs = gpu.kernel("attend_inputs", "attend_inputs", {**sizes, "TILES": tiles})
    items = -(-(spec.n_heads + 2 * spec.n_kv_heads) // (threads // 32))
    args = [
        step,
        place.keys,
        place.values,
        pointers(*call.weights[:3]),
        pointers(*call.inputs),
        ctypes.c_float(call.weights.eps),
        queries,
    ]
    rows = _tiles if tiles else _floats
    return [
        Launch(inputs, (items, tokens), threads, 0, args),
        rows(gpu, step, spec, call, chunk),
    ]


def _tiles(
    gpu: GPU, step: int, spec: AttentionShape, call: AttendCall, chunk: tuple[int, int]
) -> Launch:
    """Attention on matrix units: a wave has 16 query vectors."""
    threads = _TILE_WAVES * gpu.runtime.wave
    defines = {**_sizes(spec, call.place), "THREADS": threads}
    function = gpu.kernel("attend_tiles", "attend_tiles", defines)
    vectors = chunk[0] * (spec.n_heads // spec.n_kv_heads)
    grid = spec.n_kv_heads, -(-vectors // (_TILE_WAVES * _TILE_ROWS))
    return Launch(function, grid, threads, 0, _rows_args(step, spec, call, chunk))


def _floats(
    gpu: GPU, step: int, spec: AttentionShape, call: AttendCall, chunk: tuple[int, int]
) -> Launch:
    """Attention in float32: a group has some heads of some tokens."""
    heads = divisor(spec.n_heads // spec.n_kv_heads, _CHUNK_ROWS)
    each = _CHUNK_ROWS // heads  # tokens of a group
    defines = {**_sizes(spec, call.place), "ROWS": heads * each, "TOKENS": each}
    function = gpu.kernel("attend_chunk", "attend_rows", defines)
    grid = spec.n_heads // heads, -(-chunk[0] // each)
    return Launch(function, grid, defines["THREADS"], 0, _rows_args(step, spec, call, chunk))


def _rows_args(
    step: int, spec: AttentionShape, call: AttendCall, chunk: tuple[int, int]
) -> list[object]:
    tokens, queries = chunk
    out = rows_out(call.out, spec.head_dim)
    places = call.place.keys, call.place.values
    return [step, *places, queries, ctypes.c_int(tokens), call.inputs.q, out]


def _sizes(spec: AttentionShape, place: KVPlace) -> dict[str, int]:
    dim = spec.head_dim
    check(
        (8 <= dim <= 256 and dim & (dim - 1) == 0, f"heads of {dim}: 8, 16, 32, 64, 128 or 256"),
        (
            spec.n_heads % spec.n_kv_heads == 0,
            f"{spec.n_heads} query heads on {spec.n_kv_heads} kv heads: not a multiple",
        ),
        (
            spec.rope_dims % 2 == 0 and spec.rope_dims <= dim,
            f"{spec.rope_dims} rotated of {dim} dimensions: not pairs of them",
        ),
    )
    return {
        "HEADS": spec.n_heads,
        "KV_HEADS": spec.n_kv_heads,
        "HEAD_DIM": dim,
        "ROPE_DIMS": spec.rope_dims,
        "KV_F32": int(place.kv_dtype == "f32"),
        "THREADS": max(64, dim),
    }
