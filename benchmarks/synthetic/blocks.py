"""Random quant blocks: valid, zero-mean, and written at the speed of the disk.

A pool of blocks is made once per type. A matrix is the pool from a random block on, over and over,
with scales for its own standard deviation, so nothing is computed per weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind

U8 = npt.NDArray[np.uint8]
POOL_BYTES = 48 << 20  # larger than any last-level cache that a benchmark would meet


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a block keeps its float16 scale and minimum (ggml-common.h); -1: it has none.

    `minimum_ratio` is the minimum over the scale at which a sub-block whose 6-bit scale and
    minimum are equal has mean zero: half of the largest quant.
    """

    scale: int
    minimum: int = -1
    minimum_ratio: float = 0.0


_LAYOUTS = {
    "Q4_K": _Layout(0, 2, 7.5),
    "Q5_K": _Layout(0, 2, 15.5),
    "Q6_K": _Layout(208),
    "Q5_0": _Layout(0),
    "Q8_0": _Layout(0),
}


class Repeated:
    """`nbytes` bytes of `source`, from byte `start` on and round again; a tensor to GGUFWriter."""

    def __init__(self, source: U8, start: int, nbytes: int) -> None:
        self._source = source.reshape(-1)
        self._start = start
        self.nbytes = nbytes

    @property
    def parts(self) -> tuple[U8, int, int]:
        """The bytes that repeat, uint8 [n], the one that the tensor begins at, and its size."""
        return self._source, self._start, self.nbytes

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes in large pieces."""
        left, start = self.nbytes, self._start
        while left:
            piece = self._source[start : start + left]
            file.write(piece.data)
            left -= len(piece)
            start = 0


class BlockPools:
    """Pools by type and standard deviation; the same seed and calls give the same bytes."""

    def __init__(self, rng: np.random.Generator, pool_bytes: int = POOL_BYTES) -> None:
        self._rng = rng
        self._pool_bytes = pool_bytes
        self._unit: dict[str, tuple[U8, npt.NDArray[np.float64]]] = {}
        self._scaled: tuple[tuple[str, float], U8] | None = None

    def matrix(self, kind: str, shape: tuple[int, ...], std: float) -> Repeated:
        """Return random weights of `shape` with standard deviation `std`, stored as `kind`."""
        elements, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
        if shape[-1] % elements:
            raise ValueError(f"rows of {shape[-1]} weights are no whole {kind} blocks")
        pool = self._pool(kind, std)
        start = int(self._rng.integers(len(pool))) * size
        return Repeated(pool, start, int(np.prod(shape)) // elements * size)

    def _pool(self, kind: str, std: float) -> U8:
        """Blocks uint8 [n, block bytes]; the last one asked for is kept."""
        if self._scaled is None or self._scaled[0] != (kind, std):
            if kind not in self._unit:
                self._unit[kind] = self._make(kind)
            blocks, scales = self._unit[kind]
            blocks = blocks.copy()
            set_scales(blocks, kind, scales * std)
            self._scaled = (kind, std), blocks
        return self._scaled[1]

    def _make(self, kind: str) -> tuple[U8, npt.NDArray[np.float64]]:
        """Return random blocks, and the scales that give them unit variance."""
        rng, size = self._rng, gguf.GGML_QUANT_SIZES[Kind[kind]][1]
        count = self._pool_bytes // size
        blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
        signs = np.ones(count)
        if kind in ("Q4_K", "Q5_K"):
            blocks[:, 4:16] = pack_scales(rng.integers(32, 64, (count, 8), dtype=np.uint8))
        elif kind == "Q6_K":  # its quants run from -32 to 31: signed scales put the mean at zero
            signed = rng.integers(64, 128, (count, 16)) * rng.choice([-1, 1], (count, 16))
            blocks[:, 192:208] = signed.astype(np.int8).view(np.uint8)
        else:
            signs = rng.choice([-1.0, 1.0], count)
        spread = rng.uniform(0.75, 1.25, count) * signs
        sample = blocks[:512].copy()
        set_scales(sample, kind, spread[:512] * 2.0**-8)
        std = float(np.std(gguf.dequantize(sample.reshape(1, -1), Kind[kind])))
        return blocks, spread * 2.0**-8 / std


def set_scales(blocks: U8, kind: str, scales: npt.NDArray[np.float64]) -> None:
    """Write each block's float16 scale, and its minimum where the type has one."""
    layout = _LAYOUTS[kind]
    blocks[:, layout.scale : layout.scale + 2] = _half_bytes(scales)
    if layout.minimum >= 0:
        minimum = _half_bytes(scales * layout.minimum_ratio)
        blocks[:, layout.minimum : layout.minimum + 2] = minimum


def pack_scales(scales: U8) -> U8:
    """Pack 6-bit scales uint8 [n, 8] and equal minimums into the 12 bytes of Q4_K and Q5_K.

    Format: `get_scale_min_k4` in ggml-quants.c.
    """
    low, high = scales[:, :4], scales[:, 4:]
    first = low | (high >> 4 << 6)
    last = (high & 15) | (high & 15) << 4
    return np.concatenate([first, first, last], axis=1)


def quantize_q4_k(values: npt.NDArray[np.float32]) -> U8:
    """Quantise float32 [rows, n] to Q4_K uint8 [rows, n / 256 * 144], symmetric around zero."""
    rows = len(values)
    parts = values.reshape(-1, 8, 32)
    peaks = np.abs(parts).max(axis=2) / 7.5
    scale = np.maximum(peaks.max(axis=1), 1e-8) / 63
    blocks = np.empty((len(parts), 144), np.uint8)
    set_scales(blocks, "Q4_K", scale)
    steps = np.ceil(peaks / scale[:, None]).clip(1, 63)
    blocks[:, 4:16] = pack_scales(steps.astype(np.uint8))
    quants = np.rint(parts / (scale[:, None] * steps)[:, :, None] + 7.5).clip(0, 15)
    pairs = quants.astype(np.uint8).reshape(-1, 4, 2, 32)
    blocks[:, 16:] = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return blocks.reshape(rows, -1)


def _half_bytes(values: npt.NDArray[np.float64]) -> U8:
    """float64 [n] as the bytes of float16: uint8 [n, 2]."""
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)
