"""Kernels over a prompt's rows of activations: norms and dense matrix products.

Every builder returns a `Launch` for up to `chunk.tokens` tokens; how many there are in a pass is
read from the step block, so that a captured graph serves every prompt.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fomoe.gguf.quants import GGMLType
from fomoe.kernels.gpu.arguments import pointers
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.matrices import Matrix
from fomoe.kernels.gpu.prompt_tiles import (
    AnyTile,
    FloatTile,
    Room,
    Size,
    Tile,
    float_tile,
    float_tile_of_halves,
    int8_tile,
)
from fomoe.kernels.gpu.step import Rows

_ROW_THREADS = 256


class Norm(NamedTuple):
    """An RMS norm: its weights float32 [size] and epsilon."""

    weight: int
    size: int
    eps: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """Address of the step block and the most tokens of a pass.

    Without `int8` quantised weights are multiplied with float32 activations, which is slow;
    `tile` and `float_tile` override the choice of tiles for int8 and for dense float32 products.
    """

    step: int
    tokens: int
    int8: bool = True
    tile: Tile | None = None
    float_tile: FloatTile | None = None

    def is_int8(self, *types: int) -> bool:
        """Whether weights of these types are multiplied with int8 activations."""
        return self.int8 and not any(GGMLType(qtype).is_float for qtype in types)


def room_of(gpu: GPU) -> Room:
    """Return what a device has for tiles."""
    return Room(gpu.runtime.cores, gpu.runtime.shared_bytes)


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def product_defines(types: tuple[int, int], rows: int, cols: int, tile: AnyTile) -> dict[str, int]:
    """Return the defines that every product has; `types` are those of a tile's two halves."""
    shared = tile.shared_bytes(types, cols)
    sizes = {"ROWS": rows, "COLS": cols, "TYPE": types[0], "TYPE_UP": types[1]}
    return {**sizes, **tile.defines(), "SHARED_BYTES": shared, "ADD": 0, "RAGGED": 0}


def norm_rows(gpu: GPU, chunk: Chunk, x: int, norm: Norm, rows: Rows) -> Launch:
    """Return rows = rms_norm(x) for x float32 [T, size]: `rows.x`, and `q` with `s`, if not 0."""
    defines = {
        "THREADS": _ROW_THREADS, "COLS": norm.size,
        "FLOAT_ROWS": int(rows.x != 0), "INT8": int(rows.q != 0),
    }  # fmt: skip
    function = gpu.kernel("rows", "norm_rows", defines)
    args = [chunk.step, x, norm.weight, ctypes.c_float(norm.eps), rows.x, rows.q, rows.s]
    return Launch(function, chunk.tokens, _ROW_THREADS, 0, args)


def dot_rows(gpu: GPU, chunk: Chunk, rows: Rows, vector: int, cols: int, out: int) -> Launch:
    """Return out [T] = rows.x times one float32 vector [cols]."""
    defines = {"THREADS": _ROW_THREADS, "COLS": cols, "FLOAT_ROWS": 0, "INT8": 0}
    function = gpu.kernel("rows", "dot_rows", defines)
    groups = ceil_div(chunk.tokens, _ROW_THREADS // gpu.runtime.wave)
    return Launch(function, groups, _ROW_THREADS, 0, [chunk.step, rows.x, vector, out])


def matmul(
    gpu: GPU, chunk: Chunk, rows: Rows, matrix: Matrix, out: int, add: bool = False
) -> Launch:
    """Return out [T, matrix.rows] = (`add`: +=) rows times the matrix, float32.

    Quantised weights take `rows.q` and `rows.s`; float weights, and all without int8, `rows.x`.
    """
    return _matmul(gpu, chunk, rows, [(matrix, out)], add)


def matmuls(
    gpu: GPU, chunk: Chunk, rows: Rows, parts: Sequence[tuple[Matrix, int]]
) -> list[Launch]:
    """Return `matmul` of the same rows for (matrix, out) of each part, one launch per shape."""
    alike: dict[tuple[int, int, int], list[tuple[Matrix, int]]] = {}
    for matrix, out in parts:
        alike.setdefault((matrix.type, matrix.rows, matrix.cols), []).append((matrix, out))
    return [_matmul(gpu, chunk, rows, some, add=False) for some in alike.values()]


def _matmul(
    gpu: GPU, chunk: Chunk, rows: Rows, parts: Sequence[tuple[Matrix, int]], add: bool
) -> Launch:
    """Return the launch for matrices of one shape and type."""
    matrix = parts[0][0]
    types = matrix.type, matrix.type
    size = Size(matrix.rows, matrix.cols, chunk.tokens, len(parts))
    tile: AnyTile
    if chunk.is_int8(*types):
        tile = chunk.tile or int8_tile(types, size, room_of(gpu))
    else:
        tile = chunk.float_tile or float_tile(size, gpu.runtime.cores)
    defines = product_defines(types, matrix.rows, matrix.cols, tile)
    defines |= {"ADD": int(add), "PARTS": len(parts)}
    function = gpu.kernel("matmul", "matmul", defines)
    grid = (ceil_div(matrix.rows, tile.rows), ceil_div(chunk.tokens, tile.tokens), len(parts))
    places = pointers(*(m.address for m, _ in parts), *(out for _, out in parts))
    args = [chunk.step, places, pointers(rows.q, rows.s, rows.x)]
    return Launch(function, grid, tile.threads, defines["SHARED_BYTES"], args)


def swiglu(gpu: GPU, chunk: Chunk, rows: Rows, gate: Matrix, up: Matrix, out: Rows) -> Launch:
    """Return out = silu(gate rows) * (up rows), [T, gate.rows], as int8 rows or as `out.x`."""
    types = (gate.type, up.type)
    tile: AnyTile
    if chunk.is_int8(*types):
        size = Size(2 * gate.rows, gate.cols, chunk.tokens)
        tile = chunk.tile or int8_tile(types, size, room_of(gpu))
    else:
        tile = float_tile_of_halves(chunk.tokens)
    defines = product_defines(types, gate.rows, gate.cols, tile)
    function = gpu.kernel("swiglu", "swiglu", defines)
    grid = (ceil_div(gate.rows, tile.rows // 2), ceil_div(chunk.tokens, tile.tokens))
    sources, results = pointers(rows.q, rows.s, rows.x), pointers(out.q, out.s, out.x)
    args = [chunk.step, gate.address, up.address, sources, results]
    return Launch(function, grid, tile.threads, defines["SHARED_BYTES"], args)
