"""Arrays in an emulated device's memory, with sentinel bytes on both sides."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.kernels import reference
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.step import Rows

GUARD = 256
SENTINEL = 0xA5


class DeviceArray:
    """`values` on the device, and whether a kernel wrote beside them."""

    def __init__(self, gpu: GPU, values: npt.NDArray[Any]) -> None:
        self._gpu, self._shape, self._dtype = gpu, values.shape, values.dtype
        self._nbytes = values.nbytes
        self._base = gpu.arena.take(values.nbytes + 2 * GUARD)
        self.address = self._base + GUARD
        whole = np.full(values.nbytes + 2 * GUARD, SENTINEL, np.uint8)
        whole[GUARD : GUARD + values.nbytes] = values.reshape(-1).view(np.uint8)
        gpu.upload(self._base, whole)

    @classmethod
    def empty(cls, gpu: GPU, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Any:
        """An array of sentinels."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return cls(gpu, np.full(nbytes, SENTINEL, np.uint8).view(dtype).reshape(shape))

    def read(self) -> npt.NDArray[Any]:
        """The values; AssertionError where the guards are not as they were."""
        whole = self._gpu.download(self._base, np.uint8, self._nbytes + 2 * GUARD)
        edges = (whole[:GUARD], whole[GUARD + self._nbytes :])
        assert all(bool((edge == SENTINEL).all()) for edge in edges)
        inner = whole[GUARD : GUARD + self._nbytes]
        return inner.view(self._dtype).reshape(self._shape)


def upload_rows(gpu: GPU, x: npt.NDArray[np.float32]) -> Rows:
    """Activations `x` [T, n] in all forms, made by the reference."""
    q, scale = reference.quantize_activations(x)
    sums = q.reshape(*scale.shape, 32).sum(axis=2, dtype=np.int32).astype(np.float32)
    pairs = np.stack([scale, scale * sums], axis=2).astype(np.float32)
    return Rows(*(DeviceArray(gpu, a).address for a in (x, q, pairs)))
