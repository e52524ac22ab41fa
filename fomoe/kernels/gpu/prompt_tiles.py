"""Tiles of the prompt's products: their shapes, the shared memory they take, which one fits.

The numbers are those of `hip/tile_int8.h` and `hip/tile_float.h`, which refuse to compile when a
launch asks for less shared memory than they use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from fomoe.errors import DeviceError
from fomoe.gguf.quants import GGMLType, row_bytes

_STEP = 256  # columns of a step of int8 tiles
_HALVED = GGMLType.Q6_K  # a scale for 16 values: twice the sums of other types

Types = tuple[int, int]  # of a tile's two halves


@dataclass(frozen=True, slots=True)
class Tile:
    """Int8: rows of weights times tokens, computed by a group of `threads`.

    `stages` steps of 256 columns are copied ahead, `part` columns unpacked at a time.
    """

    rows: int
    tokens: int
    threads: int
    stages: int = 2
    part: int = 128

    def defines(self) -> dict[str, int]:
        """Return the names the kernels know the tile by."""
        return {
            "INT8": 1, "TILE_ROWS": self.rows, "TILE_TOKENS": self.tokens,
            "THREADS": self.threads, "TILE_STAGES": self.stages, "PART": self.part,
        }  # fmt: skip

    def shared_bytes(self, types: Types, cols: int) -> int:
        """Return the shared memory of a group."""
        raw = max(_raw_stride(qtype, cols) for qtype in types)
        stage = self.rows * raw + self.tokens * (_STEP + 16 + 80)
        scales = self.part // 32 * (self.rows + 2) * 8
        used = self.stages * stage + self.rows * (self.part + 16) + scales
        return max(used, _result_bytes(self)) + 4 * self.tokens


@dataclass(frozen=True, slots=True)
class FloatTile:
    """Float32: rows of weights times tokens, computed by a group of `threads`.

    A thread has micro[0] rows x micro[1] tokens of results; where that makes fewer threads, slices
    of them share out the `step` columns that come at a time.
    """

    rows: int
    tokens: int
    threads: int
    micro: tuple[int, int]
    step: int

    def defines(self) -> dict[str, int]:
        """Return the names the kernels know the tile by."""
        return {
            "INT8": 0, "TILE_ROWS": self.rows, "TILE_TOKENS": self.tokens,
            "THREADS": self.threads, "MICRO_ROWS": self.micro[0], "MICRO_TOKENS": self.micro[1],
            "STEP": self.step,
        }  # fmt: skip

    def shared_bytes(self, types: Types, cols: int) -> int:
        """Return the shared memory of a group, the same for all types."""
        used = self.step * (self.rows + self.tokens + 8) * 4
        return max(used, _result_bytes(self)) + 4 * self.tokens


AnyTile = Tile | FloatTile
_T = TypeVar("_T", Tile, FloatTile)


class Room(NamedTuple):
    """What a device has for tiles: cores, each for a group, and a group's most shared memory."""

    cores: int
    shared_bytes: int


class Size(NamedTuple):
    """Of a product: so many matrices of rows x cols with the same tokens."""

    rows: int
    cols: int
    tokens: int
    matrices: int = 1


def _result_bytes(tile: AnyTile) -> int:
    return tile.tokens * (tile.rows + 4) * 4


def _raw_stride(qtype: int, cols: int) -> int:
    """Bytes in shared memory for a row's blocks of a step, with what aligns them to 16."""
    step = row_bytes(GGMLType(qtype), _STEP)
    aligned = step % 16 == 0 and row_bytes(GGMLType(qtype), cols) % 16 == 0
    return step if aligned else (step + 14 + 15) // 16 * 16


# Tiles in order of preference, by time on an H200. Those of one stage are for devices with 64 KiB.
_SMALLER = (
    Tile(64, 64, 128), Tile(64, 64, 256, 1), Tile(64, 32, 128), Tile(64, 32, 128, 1),
    Tile(64, 16, 128, 3), Tile(64, 16, 128, 1),
)  # fmt: skip
_DENSE = (Tile(128, 128, 512), Tile(128, 64, 256), *_SMALLER)
_DENSE_HALVED = (Tile(128, 128, 256), Tile(64, 128, 256), *_SMALLER)

# By the most tokens of an expert, were all chosen alike: tiles of the products into and out of it.
_EXPERT_64 = (Tile(64, 64, 256), Tile(64, 64, 256, 1))
_EXPERT_32 = (Tile(64, 32, 128), Tile(64, 32, 128, 1))
_EXPERT_16 = (Tile(64, 16, 128, 3), Tile(64, 16, 128, 1))
_Choice = tuple[Tile, ...]
_EXPERT: tuple[tuple[int, _Choice, _Choice], ...] = (
    (1 << 30, (Tile(128, 64, 256), *_EXPERT_64), _EXPERT_64),
    (24, _EXPERT_32, (Tile(128, 32, 256), *_EXPERT_32)),
    (14, _EXPERT_16, _EXPERT_16),
)

_FLOAT = (
    FloatTile(128, 64, 256, (8, 8), 32),
    FloatTile(64, 64, 256, (8, 8), 64),
    FloatTile(64, 32, 512, (8, 4), 128),
    FloatTile(32, 32, 512, (4, 4), 128),
    FloatTile(16, 32, 512, (4, 4), 256),
    FloatTile(16, 16, 256, (4, 4), 256),
)
_FLOAT_OF_HALVES = (FloatTile(64, 64, 256, (8, 8), 64), FloatTile(64, 16, 256, (4, 4), 64))


def int8_tile(types: Types, size: Size, room: Room) -> Tile:
    """Return the tile for a product of quantised matrices.

    Raises:
        DeviceError: the device has too little shared memory for any.
    """
    tiles = _DENSE_HALVED if _HALVED in types else _DENSE
    return _filling(_fitting(tiles, types, size.cols, room), size, room.cores)


def expert_tiles(
    types: Sequence[int], cols: tuple[int, int], each: int, room: Room
) -> tuple[Tile, Tile]:
    """Return tiles of equally many tokens for the products into and out of experts.

    `types` are those of gate, up and down, `cols` the columns of gate and of down; `each` expert
    gets so many tokens.

    Raises:
        DeviceError: the device has too little shared memory for any.
    """
    gate_up, down = (types[0], types[1]), (types[2], types[2])
    _, into, out = [choice for choice in _EXPERT if each <= choice[0]][-1]
    if _HALVED not in down and into[0].tokens == 64:
        out = into
    if _HALVED in gate_up and into[0].tokens == 64:
        into = _EXPERT_64
    return _fitting(into, gate_up, cols[0], room)[0], _fitting(out, down, cols[1], room)[0]


def float_tile(size: Size, cores: int) -> FloatTile:
    """Return the float32 tile for a product of any matrices."""
    return _filling(_FLOAT, size, cores)


def float_tile_of_halves(tokens: int) -> FloatTile:
    """Return the float32 tile of gate and up rows for matrices that `tokens` share."""
    return next((t for t in _FLOAT_OF_HALVES if tokens > t.tokens // 4), _FLOAT_OF_HALVES[-1])


def _fitting(tiles: Sequence[Tile], types: Types, cols: int, room: Room) -> list[Tile]:
    fitting = [t for t in tiles if t.shared_bytes(types, cols) <= room.shared_bytes]
    if fitting:
        return fitting
    needed = tiles[-1].shared_bytes(types, cols)
    raise DeviceError(
        f"a tile of {cols} columns needs {needed:,} bytes of shared memory, the device has "
        f"{room.shared_bytes:,}; decode the prompt on another device"
    )


def _filling(tiles: Sequence[_T], size: Size, cores: int) -> _T:
    """Return the first tile that makes a group for most cores and is used for more than a half."""
    lowest, fewest = min(tile.rows for tile in tiles), min(tile.tokens for tile in tiles)
    used = [
        tile
        for tile in tiles
        if (tile.rows < 2 * size.rows or tile.rows == lowest)
        and (tile.tokens < 2 * size.tokens or tile.tokens == fewest)
    ]

    def groups(tile: AnyTile) -> int:
        return -(-size.rows // tile.rows) * size.matrices * -(-size.tokens // tile.tokens)

    filling = (tile for tile in used if 4 * groups(tile) >= 3 * cores)
    return next(filling, max(used, key=groups))
