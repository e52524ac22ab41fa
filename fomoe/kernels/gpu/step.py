"""Blocks that tell kernels what changes from pass to pass, as numpy sees them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# struct fm_step of fomoe/kernels/hip/step.h
STEP = np.dtype(
    [
        ("token", "<i4"),
        ("position", "<i4"),
        ("tokens", "<i4"),
        ("reserved", "<i4"),
        ("state", "<u8"),
    ]
)


def picks(top_k: int) -> np.dtype[np.void]:
    """Return the layout of a decode layer's chosen experts, ascending by id.

    `address` uint64 [3, K] are device addresses of gate, up and down, `weight` float32 [K] and
    `id` int32 [K].
    """
    return np.dtype(
        [("address", "<u8", (3, top_k)), ("weight", "<f4", top_k), ("id", "<i4", top_k)]
    )


class Rows(NamedTuple):
    """Device addresses of activation rows [T, n]; 0 where a form is absent.

    `x` float32 [T, n]; `q` int8 [T, n] and `s` float32 [T, n / 32, 2], which holds d and d * sum of
    the block's 32 int8 with d = max|x| / 127, as in fomoe.kernels.reference.quantize_activations.
    """

    x: int
    q: int
    s: int
