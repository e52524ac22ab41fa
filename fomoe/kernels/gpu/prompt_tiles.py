"""Tiles of the prompt's products: their shapes, the shared memory they take, which one fits.

The numbers are those of `hip/tile_int8.h` and `hip/tile_float.h`, which refuse to compile when a
launch asks for less shared memory than they use.
"""

from __future__ import annotations

from dataclasses import dataclass

from fomoe.errors import DeviceError
from fomoe.gguf.quants import GGMLType, row_bytes

_STEP = 256  # columns of a step


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of weights times tokens, computed by a group of `threads`.

    Int8 tiles copy `stages` steps of 256 columns ahead and unpack `part` columns at a time; in
    float32 tiles a thread has micro x micro results.
    """

    rows: int
    tokens: int
    threads: int
    stages: int = 2
    part: int = 128
    micro: int = 0

    def defines(self, is_int8: bool) -> dict[str, int]:
        """Return the names the kernels know the tile by."""
        shape = {"TILE_ROWS": self.rows, "TILE_TOKENS": self.tokens, "THREADS": self.threads}
        if is_int8:
            return {**shape, "INT8": 1, "TILE_STAGES": self.stages, "PART": self.part}
        return {**shape, "INT8": 0, "MICRO": self.micro}

    def shared_bytes(self, types: tuple[int, int], cols: int, is_int8: bool) -> int:
        """Return the shared memory of a group; `types` are those of the tile's two halves."""
        results = self.tokens * (self.rows + 4) * 4
        if not is_int8:
            return max(32 * (self.rows + self.tokens + 8) * 4, results) + 4 * self.tokens
        raw = max(_raw_stride(qtype, cols) for qtype in types)
        stage = self.rows * raw + self.tokens * (_STEP + 16 + 80)
        scales = self.part // 32 * (self.rows + 2) * 8
        used = self.stages * stage + self.rows * (self.part + 16) + scales
        return max(used, results) + 4 * self.tokens


def _raw_stride(qtype: int, cols: int) -> int:
    """Bytes in shared memory for a row's blocks of a step, with what aligns them to 16."""
    step = row_bytes(GGMLType(qtype), _STEP)
    aligned = step % 16 == 0 and row_bytes(GGMLType(qtype), cols) % 16 == 0
    return step if aligned else (step + 14 + 15) // 16 * 16


# Most tokens that share a matrix: int8 tiles in order of preference; the first that fits is taken.
_INT8 = (
    (16, (Tile(64, 16, 128, 3), Tile(64, 16, 128, 1))),
    (40, (Tile(64, 32, 128), Tile(64, 32, 128, 1))),
    (1 << 30, (Tile(128, 64, 256), Tile(64, 64, 256, 1), Tile(64, 32, 128, 1))),
)
_FLOAT = (
    (16, Tile(64, 16, 256, micro=2)),
    (512, Tile(32, 32, 256, micro=2)),
    (1 << 30, Tile(64, 64, 256, micro=4)),
)


def int8_tile(types: tuple[int, int], cols: int, tokens: int, shared_bytes: int) -> Tile:
    """Return the tile for matrices that `tokens` share, in groups with that much shared memory."""
    candidates = next(tiles for most, tiles in _INT8 if tokens <= most)
    for tile in candidates:
        if tile.shared_bytes(types, cols, True) <= shared_bytes:
            return tile
    needed = candidates[-1].shared_bytes(types, cols, True)
    raise DeviceError(
        f"a tile of {cols} columns needs {needed:,} bytes of shared memory, the device has "
        f"{shared_bytes:,}; decode the prompt on another device"
    )


def float_tile(tokens: int, is_halved: bool = False) -> Tile:
    """Return the float32 tile; `is_halved` for a tile of gate and up rows."""
    if is_halved:
        return _FLOAT[0][1] if tokens <= 16 else _FLOAT[-1][1]
    return next(tile for most, tile in _FLOAT if tokens <= most)
