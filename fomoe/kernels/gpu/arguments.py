"""Arguments of kernels that are structs of pointers, and the sizes that kernels accept."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.arena import aligned
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.step import Rows


def pointers(*addresses: int) -> ctypes.Array[ctypes.c_uint64]:
    """Return a struct of device addresses (or other 8-byte numbers), passed by value."""
    return (ctypes.c_uint64 * len(addresses))(*addresses)


def rows_out(out: Rows, dim: int) -> ctypes.Array[ctypes.c_uint64]:
    """Return the RowsOut of rows.h for vectors of `dim` values each.

    Raises:
        DeviceError: int8 rows are wanted of vectors that are not made of blocks of 32, or no rows.
    """
    if out.q and dim % 32:
        raise DeviceError(f"int8 rows of heads of {dim} values: their blocks have 32; use float32")
    if bool(out.q) != bool(out.s) or not (out.q or out.x):
        raise DeviceError(f"{out}: rows are float32 (x), int8 (q with s), or both")
    return pointers(out.x, out.q, out.s)


def check(*conditions: tuple[bool, str]) -> None:
    """Raise DeviceError with the first text whose condition does not hold."""
    for holds, text in conditions:
        if not holds:
            raise DeviceError(text)


def divisor(n: int, most: int) -> int:
    """Return the largest divisor of n that is not above `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def zeros_at(gpu: GPU, nbytes: int) -> int:
    """Return the address of `nbytes` of the GPU's arena that hold zeros."""
    address = gpu.arena.take(nbytes)
    gpu.runtime.fill(address, 0, nbytes, gpu.stream)
    gpu.runtime.synchronize(gpu.stream)
    return address


def starts_of(sizes: Sequence[int]) -> list[int]:
    """Return where aligned pieces of these sizes begin one behind the other, and the last's end."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + aligned(size))
    return starts
