"""Random quant blocks and their values in NumPy alone, where no gguf package is at hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F64 = npt.NDArray[np.float64]

F32, Q8_0, Q4_K, Q6_K = 0, 8, 12, 14
# type: values and bytes of a block, bytes at which float16 scales lie
_FORMATS = {Q8_0: (32, 34, (0,)), Q4_K: (256, 144, (0, 2)), Q6_K: (256, 210, (208,))}


def random_rows(rng: np.random.Generator, qtype: int, rows: int, cols: int) -> U8:
    """Return uint8 [rows, row_bytes] of valid blocks, or of float32 values."""
    if qtype == F32:
        return rng.standard_normal((rows, cols), np.float32).view(np.uint8)
    values, nbytes, scales = _FORMATS[qtype]
    blocks = rng.integers(0, 256, (rows * cols // values, nbytes), np.uint8)
    for at in scales:
        d = rng.uniform(1e-4, 2e-4, len(blocks)).astype("<f2")
        blocks[:, at : at + 2] = d.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def values_of(qtype: int, rows: U8) -> F64:
    """Return the float64 values of rows of blocks (ggml-quants.c)."""
    if qtype == F32:
        return rows.view(np.float32).astype(np.float64)
    blocks = rows.reshape(-1, _FORMATS[qtype][1])
    values = {Q8_0: _q8_0, Q4_K: _q4_k, Q6_K: _q6_k}[qtype](blocks)
    return values.reshape(len(rows), -1)


def _half(blocks: U8, at: int) -> F64:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float64)


def _q8_0(blocks: U8) -> F64:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8)


def _q4_k(blocks: U8) -> F64:
    a, b, c = (blocks[:, 4 + 4 * i : 8 + 4 * i].astype(int) for i in range(3))
    scale = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=1)
    minimum = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=1)
    nibbles = blocks[:, 16:].reshape(-1, 4, 1, 32) >> np.array([0, 4]).reshape(1, 1, 2, 1) & 15
    q = nibbles.reshape(-1, 8, 32)
    return (_half(blocks, 0) * scale)[..., None] * q - (_half(blocks, 2) * minimum)[..., None]


def _q6_k(blocks: U8) -> F64:
    low = blocks[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4]).reshape(1, 1, 2, 1) & 15
    shifts = np.array([0, 2, 4, 6]).reshape(1, 1, 4, 1)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    q = (low.reshape(-1, 2, 4, 32) | high << 4).astype(int) - 32
    scale = _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return scale[..., None] * q.reshape(-1, 16, 16)
