"""From ids to vectors and from scores to ids: embedding, top-k, the largest logit."""

from __future__ import annotations

import ctypes
from typing import Protocol

import numpy as np

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.arguments import check, zeros_at
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch

# ggml's numbers: F32, F16, Q5_0, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_XS, BF16
_TABLE_TYPES = (0, 1, 6, 8, 12, 13, 14, 23, 30)
_THREADS = 256
_PEAK_THREADS = 512
_MOST_EXPERTS, _MOST_CHOSEN = 1024, 32
_PEAK_BYTES = 16

# What `largest` writes.
LARGEST = np.dtype([("id", "<i4"), ("logit", "<f4"), ("log_sum", "<f4")])


class Table(Protocol):
    """A matrix of GGUF blocks as they lie in the file, in device memory."""

    @property
    def address(self) -> int:
        """Where its first row is."""

    @property
    def type(self) -> int:
        """Number of its type in ggml."""

    @property
    def cols(self) -> int:
        """Values of a row."""


def embed(gpu: GPU, step: int, table: Table, x: int) -> Launch:
    """Return the launch that writes row `token` of the step block to `x` float32 [cols].

    Raises:
        DeviceError: rows of this type cannot be read.
    """
    function = gpu.kernel("embed", "embed", _table_defines(table))
    return Launch(function, -(-table.cols // _THREADS), _THREADS, 0, [step, table.address, x])


def embed_rows(gpu: GPU, step: int, table: Table, ids: tuple[int, int], x: int) -> Launch:
    """Return the launch that writes the rows of T ids to `x` float32 [T, cols].

    `ids` is the address of int32 [T] and the largest T.

    Raises:
        DeviceError: rows of this type cannot be read.
    """
    address, tokens = ids
    function = gpu.kernel("embed", "embed_rows", _table_defines(table))
    grid = -(-table.cols // _THREADS), tokens
    return Launch(function, grid, _THREADS, 0, [step, table.address, address, x])


def choose_rows(
    gpu: GPU, step: int, sizes: tuple[int, int, int], scores: int, out: tuple[int, int]
) -> Launch:
    """Return the launch that chooses experts for T tokens, by score, then by lower id.

    `sizes` are the largest T, E experts and the K of them that are chosen; `scores` float32 [T, E];
    `out` are the addresses of ids int32 [T, K], ascending, and weights float32 [T, K]: the softmax
    over all experts, renormalised.

    Raises:
        DeviceError: more experts than the kernel takes.
    """
    tokens, experts, top_k = sizes
    check(
        (
            experts <= _MOST_EXPERTS and top_k <= min(experts, _MOST_CHOSEN),
            f"{top_k} of {experts} experts: at most {_MOST_CHOSEN} of {_MOST_EXPERTS} are chosen",
        )
    )
    defines = {"EXPERTS": experts, "TOP_K": top_k, "THREADS": _THREADS}
    function = gpu.kernel("choose", "choose_rows", defines)
    return Launch(function, tokens, _THREADS, 0, [step, scores, *out])


def largest(gpu: GPU, logits: int, n: int, out: int) -> Launch:
    """Return the launch that writes a LARGEST to `out`: id (ties: the lower), logit, logsumexp.

    `logits` float32 [n].
    """
    groups = max(1, min(gpu.runtime.cores, n // _PEAK_THREADS))
    function = gpu.kernel("pick", "largest", {"THREADS": _PEAK_THREADS})
    parts = gpu.arena.take(_PEAK_BYTES * groups)
    args = [logits, ctypes.c_int(n), parts, zeros_at(gpu, 4), out]
    return Launch(function, groups, _PEAK_THREADS, 0, args, early=True)


def _table_defines(table: Table) -> dict[str, int]:
    if table.type not in _TABLE_TYPES:
        raise DeviceError(
            f"embedding of ggml type {table.type}: a GPU reads rows of types {_TABLE_TYPES}"
        )
    return {"TYPE": int(table.type), "COLS": table.cols}
