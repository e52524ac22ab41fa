"""Arrays in a GPU's memory, with sentinels around those that kernels write."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.step import STEP, Rows

GUARD = 256
SENTINEL = 0xA5

Array = npt.NDArray[Any]


class Guarded(NamedTuple):
    """Device memory between two guards."""

    gpu: GPU
    address: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, gpu: GPU, values: Array) -> Guarded:
        """A copy of an array."""
        whole = np.full(values.nbytes + 2 * GUARD, SENTINEL, np.uint8)
        whole[GUARD : GUARD + values.nbytes] = (
            np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        )
        start = gpu.arena.take(whole.nbytes)
        gpu.upload(start, whole)
        return cls(gpu, start + GUARD, values.dtype, values.shape)

    @classmethod
    def empty(cls, gpu: GPU, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Guarded:
        """Memory that holds sentinels."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return cls.of(gpu, np.full(nbytes, SENTINEL, np.uint8).view(dtype).reshape(shape))

    def clear(self) -> None:
        """Put sentinels there again."""
        nbytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self.gpu.upload(self.address, np.full(nbytes, SENTINEL, np.uint8))

    def read(self) -> Array:
        """What lies there now; nothing may have been written beside it."""
        nbytes = int(np.prod(self.shape)) * self.dtype.itemsize
        whole = self.gpu.download(self.address - GUARD, np.uint8, nbytes + 2 * GUARD)
        edges = np.concatenate([whole[:GUARD], whole[-GUARD:]])
        assert (edges == SENTINEL).all(), "wrote beside an output"
        return whole[GUARD:-GUARD].view(self.dtype).reshape(self.shape)


class RowsOut(NamedTuple):
    """Rows that a kernel writes, float32 and int8."""

    x: Guarded
    q: Guarded | None
    s: Guarded | None

    @classmethod
    def empty(cls, gpu: GPU, tokens: int, n: int, int8: bool) -> RowsOut:
        """Room for [tokens, n]."""
        x = Guarded.empty(gpu, (tokens, n), np.float32)
        if not int8:
            return cls(x, None, None)
        q = Guarded.empty(gpu, (tokens, n), np.int8)
        return cls(x, q, Guarded.empty(gpu, (tokens, n // 32, 2), np.float32))

    @property
    def rows(self) -> Rows:
        """What builders of launches want."""
        return Rows(
            self.x.address, self.q.address if self.q else 0, self.s.address if self.s else 0
        )

    def read(self) -> tuple[Array, ...]:
        """x, and q and s where they are."""
        return tuple(part.read() for part in self if part is not None)


def step_block(
    gpu: GPU, *, token: int = 0, position: int = 0, tokens: int = 1, state: int = 0
) -> int:
    """Return the address of a step block."""
    address = gpu.arena.take(STEP.itemsize)
    gpu.upload(address, np.array((token, position, tokens, 0, state), STEP))
    return address


def run(gpu: GPU, launches: Launch | list[Launch]) -> None:
    """Run launches one after the other and wait."""
    for launch in [launches] if isinstance(launches, Launch) else launches:
        gpu.launch(launch)
    gpu.runtime.synchronize(gpu.stream)


def error(found: Array, expected: Array) -> float:
    """The largest difference over the largest value expected."""
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    top = float(np.abs(expected).max(initial=0.0)) or 1.0
    return float(np.abs(found.astype(np.float64) - expected).max(initial=0.0)) / top


def check_rows(found: tuple[Array, ...], expected: Array, tolerance: float) -> None:
    """Float rows are near `expected`, int8 rows are exactly those of the float rows."""
    from fomoe.kernels import reference

    assert error(found[0], expected) < tolerance
    if len(found) == 1:
        return
    q, scale = reference.quantize_activations(found[0])
    sums = scale * q.reshape(*scale.shape, 32).sum(axis=2, dtype=np.int32).astype(np.float32)
    np.testing.assert_array_equal(found[1], q)
    np.testing.assert_array_equal(found[2], np.stack([scale, sums], axis=-1))
