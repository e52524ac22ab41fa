"""Random GGUF blocks and their values, in NumPy alone: GPU machines have no other library.

Formats: ggml-common.h of https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.gguf.quants import GGMLType

U8 = npt.NDArray[np.uint8]
F64 = npt.NDArray[np.float64]

# Where a block keeps its float16 scale, and its minimum with the ratio that centres the values.
_SCALES = {
    GGMLType.Q8_0: (0, None, 0.0),
    GGMLType.Q5_0: (0, None, 0.0),
    GGMLType.Q4_K: (0, 2, 7.5),
    GGMLType.Q5_K: (0, 2, 15.5),
    GGMLType.Q6_K: (208, None, 0.0),
    GGMLType.IQ4_XS: (0, None, 0.0),
}
_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float64
)


def random_blocks(rng: np.random.Generator, kind: GGMLType, rows: int, cols: int) -> U8:
    """Return random rows uint8 [rows, row_bytes] whose products with unit input are near one."""
    if kind.is_float:
        values = rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(cols**-0.5)
        if kind is GGMLType.BF16:
            return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        return values.astype("<f2" if kind is GGMLType.F16 else "<f4").view(np.uint8)
    count = rows * cols // kind.block_elements
    blocks = rng.integers(0, 256, (count, kind.block_bytes), dtype=np.uint8)
    scale, minimum, ratio = _SCALES[kind]
    d = rng.uniform(0.5, 1.5, count) * 2.0**-10
    blocks[:, scale : scale + 2] = _half_bytes(d)
    if minimum is not None:
        blocks[:, minimum : minimum + 2] = _half_bytes(d * ratio)
    return blocks.reshape(rows, -1)


def values_of(kind: GGMLType, rows: U8) -> F64:
    """Return the values float64 [rows, cols] of rows of blocks."""
    if kind.is_float:
        if kind is GGMLType.BF16:
            return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return rows.view("<f2" if kind is GGMLType.F16 else "<f4").astype(np.float64)
    blocks = rows.reshape(-1, kind.block_bytes)
    return _VALUES[kind](blocks).reshape(len(rows), -1)


def _half_bytes(values: npt.NDArray[np.float64]) -> U8:
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _half(blocks: U8, at: int) -> F64:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float64)


def _nibbles(q: U8) -> npt.NDArray[np.int64]:
    """[n, bytes] to [n, 2, bytes]: all low nibbles, then all high ones."""
    return np.stack([q & 15, q >> 4], axis=1).astype(np.int64)


def _q8_0(blocks: U8) -> F64:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8)


def _q5_0(blocks: U8) -> F64:
    fifth = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little").astype(np.int64)
    return _half(blocks, 0) * (_nibbles(blocks[:, 6:]).reshape(-1, 32) + 16 * fifth - 16)


def _affine(blocks: U8, q: npt.NDArray[np.int64]) -> F64:
    """q [n, 8, 32] with the 6-bit scales and minimums of Q4_K and Q5_K."""
    s, m, high = (blocks[:, a : a + 4].astype(np.int64) for a in (4, 8, 12))
    scale = np.concatenate([s & 63, (high & 15) | (s >> 6) << 4], axis=1)
    minimum = np.concatenate([m & 63, (high >> 4) | (m >> 6) << 4], axis=1)
    d, dmin = _half(blocks, 0), _half(blocks, 2)
    return (d * scale)[..., None] * q - (dmin * minimum)[..., None]


def _q4_k(blocks: U8) -> F64:
    return _affine(blocks, _nibbles(blocks[:, 16:].reshape(-1, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: U8) -> F64:
    low = _nibbles(blocks[:, 48:].reshape(-1, 32)).reshape(-1, 8, 32)
    fifth = blocks[:, None, 16:48] >> np.arange(8)[None, :, None] & 1
    return _affine(blocks, low + 16 * fifth)


def _q6_k(blocks: U8) -> F64:
    low = _nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2)[None, None, :, None] & 3
    q = (low + 16 * high.astype(np.int64) - 32).reshape(-1, 16, 16)
    return _half(blocks, 208)[..., None] * blocks[:, 192:208].view(np.int8)[..., None] * q


def _iq4_xs(blocks: U8) -> F64:
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    top = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2) & 3
    scale = (low.astype(np.int64) | top.astype(np.int64) << 4) - 32
    levels = _LEVELS[_nibbles(blocks[:, 8:].reshape(-1, 16))].reshape(-1, 8, 32)
    return (_half(blocks, 0) * scale)[..., None] * levels


_VALUES = {
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_XS: _iq4_xs,
}
