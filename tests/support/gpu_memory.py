"""Device memory for tests: arrays with sentinels around them, and rows of activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.kernels import reference
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.step import STEP, Rows

GUARD = 256
SENTINEL = 0xA5

Array = npt.NDArray[Any]


class Memory:
    """Arrays on a device, each between sentinels that `take` looks at."""

    def __init__(self, gpu: GPU) -> None:
        self._gpu = gpu
        self._placed: dict[int, tuple[tuple[int, ...], np.dtype[Any]]] = {}

    def put(self, array: Array) -> int:
        """Place a copy; returns its address."""
        edge = np.full(GUARD, SENTINEL, np.uint8)
        body = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        base = self._gpu.arena.take(body.nbytes + 2 * GUARD)
        self._gpu.upload(base, np.concatenate([edge, body, edge]))
        self._placed[base + GUARD] = (array.shape, array.dtype)
        return base + GUARD

    def take(self, address: int) -> Array:
        """Return what lies there now; nothing may have been written beside it."""
        shape, dtype = self._placed[address]
        nbytes = int(np.prod(shape)) * dtype.itemsize
        found = self._gpu.download(address - GUARD, np.uint8, nbytes + 2 * GUARD)
        assert (found[:GUARD] == SENTINEL).all(), "wrote before an array"
        assert (found[GUARD + nbytes :] == SENTINEL).all(), "wrote beyond an array"
        return found[GUARD : GUARD + nbytes].view(dtype).reshape(shape)

    def step(self, tokens: int) -> int:
        """A step block for a pass of that many tokens."""
        return self.put(np.array([(0, 0, tokens, 0, 0)], STEP))

    def rows(self, x: Array) -> Rows:
        """Rows of activations in all their forms."""
        q, d = reference.quantize_activations(x)
        sums = q.reshape(*d.shape, 32).sum(axis=2).astype(np.float32)
        return Rows(self.put(x), self.put(q), self.put(np.stack([d, d * sums], axis=2)))

    def empty_rows(self, tokens: int, n: int) -> Rows:
        """Rows to be written in all their forms."""
        x, q = np.zeros((tokens, n), np.float32), np.zeros((tokens, n), np.int8)
        return Rows(self.put(x), self.put(q), self.put(np.zeros((tokens, n // 32, 2), np.float32)))
