"""Small things between host and device by kernels, beside what the copy engine has to do."""

from __future__ import annotations

import ctypes

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch

_THREADS = 256
_WORD = 4


def bring(gpu: GPU, to: int, source: int, nbytes: int) -> Launch:
    """Return the launch that copies to `to`; one end is pinned host memory as the device sees it.

    Raises:
        DeviceError: the addresses or the bytes are not in words of 4.
    """
    if (to | source | nbytes) % _WORD:
        raise DeviceError(f"{nbytes} bytes from {source:#x} to {to:#x}: all must divide by {_WORD}")
    words = nbytes // _WORD
    function = gpu.kernel("bring", "bring", {"THREADS": _THREADS})
    return Launch(function, -(-words // _THREADS), _THREADS, 0, [source, to, ctypes.c_int(words)])


def add(gpu: GPU, to: int, source: int, count: int) -> Launch:
    """Return the launch that adds `count` float32 of pinned host memory, as the device sees it."""
    function = gpu.kernel("bring", "add", {"THREADS": _THREADS})
    args = [source, to, ctypes.c_int(count)]
    return Launch(function, -(-count // _THREADS), _THREADS, 0, args)
