"""Where the arrays of a layer step lie in a step arena; the same on both ends.

One arena per device, two buffers that alternate by step. The driver writes everything but `out`
before it sends STEP; the device writes `out` before it sends DONE; the rings order the accesses.
For entry i of a step, pairs `pair_start[i] .. pair_start[i + 1]` are its (token, expert) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.engine.transfers import ENTRY

_ALIGN = 64


@dataclass(frozen=True, slots=True)
class StepViews:
    """Arrays of one buffer at full size; `out` [T, D] and `x` [T, D] float32."""

    x: npt.NDArray[np.float32]
    out: npt.NDArray[np.float32]
    order: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    pair_token: npt.NDArray[np.int32]
    pair_start: npt.NDArray[np.int32]
    entries: npt.NDArray[np.void]
    offsets: dict[str, int]


class StepArena:
    """Layout for at most `max_tokens` tokens of width `hidden`, `top_k` of `n_experts`."""

    BUFFERS = 2

    def __init__(self, max_tokens: int, hidden: int, top_k: int, n_experts: int) -> None:
        self.max_tokens, self.top_k = max_tokens, top_k
        pairs = max_tokens * top_k
        self._parts: tuple[tuple[str, npt.DTypeLike, tuple[int, ...]], ...] = (
            ("x", np.float32, (max_tokens, hidden)),
            ("out", np.float32, (max_tokens, hidden)),
            ("order", np.int32, (max_tokens, top_k)),
            ("weights", np.float32, (max_tokens, top_k)),
            ("pair_token", np.int32, (pairs,)),
            ("pair_start", np.int32, (min(pairs, n_experts) + 1,)),
            ("entries", ENTRY, (min(pairs, n_experts),)),
        )
        self._stride = sum(_size(dtype, shape) for _, dtype, shape in self._parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole arena."""
        return self.BUFFERS * self._stride

    def views(self, arena: npt.NDArray[np.uint8]) -> tuple[StepViews, ...]:
        """Return the arrays of each buffer over the arena's bytes."""
        out = []
        for buffer in range(self.BUFFERS):
            offset = buffer * self._stride
            arrays, offsets = {}, {}
            for name, dtype, shape in self._parts:
                count = int(np.prod(shape))
                nbytes = count * np.dtype(dtype).itemsize
                arrays[name] = arena[offset : offset + nbytes].view(dtype).reshape(shape)
                offsets[name] = offset
                offset += _size(dtype, shape)
            out.append(StepViews(**arrays, offsets=offsets))
        return tuple(out)


def _size(dtype: npt.DTypeLike, shape: tuple[int, ...]) -> int:
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return -(-nbytes // _ALIGN) * _ALIGN
