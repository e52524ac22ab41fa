"""What the kernel tests share: guarded arrays, calls that can be cut by token, instruction sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.kernels.cpu import ops

GUARD = 64
SENTINEL = 0xA5

Array = npt.NDArray[Any]


def available_isas() -> list[str]:
    """Instruction sets of this machine, scalar first."""
    found, before = [], ops.isa()
    for name in ("scalar", "avx2", "avx512vnni"):
        try:
            ops.use_isa(name)
        except ValueError:
            continue
        found.append(name)
    ops.use_isa(before)
    return found


class Guarded:
    """An array with sentinel bytes on both sides."""

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._bytes = np.full(nbytes + 2 * GUARD, SENTINEL, np.uint8)
        self.array: Array = self._bytes[GUARD : GUARD + nbytes].view(dtype).reshape(shape)

    @classmethod
    def of(cls, values: Array) -> Guarded:
        """A guarded copy."""
        guarded = cls(values.shape, values.dtype)
        guarded.array[...] = values
        return guarded

    def intact(self) -> bool:
        """Whether nothing was written beside the array."""
        edges = (self._bytes[:GUARD], self._bytes[-GUARD:])
        return all(bool((edge == SENTINEL).all()) for edge in edges)


@dataclass(frozen=True)
class Call:
    """One call of an operation and what it should give.

    `outputs` are the guarded arrays among `args` that it writes; `by_token` are the places in
    `args` with a leading axis of T tokens, `position` the place of the first token's position.
    """

    op: Callable[..., None]
    args: tuple[Any, ...]
    outputs: tuple[Guarded, ...]
    expected: tuple[Array, ...]
    tokens: int
    by_token: tuple[int, ...] = ()
    position: int = -1

    def run(self) -> tuple[bytes, ...]:
        """All tokens in one call."""
        self.op(*self.args)
        return self._bits()

    def run_in_parts(self, sizes: Iterator[int]) -> tuple[bytes, ...]:
        """The tokens in calls of the given sizes, one after the other."""
        start = 0
        while start < self.tokens:
            stop = min(self.tokens, start + next(sizes))
            self.op(*(self._part(i, arg, start, stop) for i, arg in enumerate(self.args)))
            start = stop
        return self._bits()

    def _part(self, i: int, arg: Any, start: int, stop: int) -> Any:
        if i in self.by_token:
            return arg[start:stop]
        return arg + start if i == self.position else arg

    def _bits(self) -> tuple[bytes, ...]:
        assert all(output.intact() for output in self.outputs), "wrote beside an output"
        return tuple(output.array.tobytes() for output in self.outputs)

    def error(self) -> float:
        """The largest difference over the largest value expected, of the worst output."""
        worst = 0.0
        for output, expected in zip(self.outputs, self.expected, strict=True):
            found = output.array.astype(np.float64)
            assert found.shape == expected.shape
            assert np.isfinite(found).all()
            top = float(np.abs(expected).max(initial=0.0)) or 1.0
            worst = max(worst, float(np.abs(found - expected).max(initial=0.0)) / top)
        return worst


@dataclass(frozen=True)
class Case:
    """An operation, the sizes to try it on and the error to allow, relative to the largest value.

    `make(rng, *sizes)` builds a call; equal seeds build equal calls.
    """

    name: str
    make: Callable[..., Call]
    sizes: tuple[tuple[Any, ...], ...]
    tolerance: float
    reason: str
