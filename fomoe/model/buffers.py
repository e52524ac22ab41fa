"""Work buffers that live as long as the model, so that the layer loop allocates nothing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fomoe.kernels.cpu import ops

F32 = npt.NDArray[np.float32]

BLOCK = 32  # activations are quantised in groups of 32 values (numerics contract)


class Buffer:
    """float32 [max_tokens, *shape] whose leading part `at(T)` is handed out as a cached view."""

    def __init__(self, max_tokens: int, *shape: int) -> None:
        self._array = np.zeros((max_tokens, *shape), dtype=np.float32)
        self._views: dict[int, F32] = {}

    def at(self, tokens: int) -> F32:
        """Return the first `tokens` rows, [tokens, *shape]."""
        view = self._views.get(tokens)
        if view is None:
            view = self._views[tokens] = self._array[:tokens]
        return view


class Int8Rows(NamedTuple):
    """Quantised activations: int8 [T, K] and float32 scales [T, K / 32]."""

    q: npt.NDArray[np.int8]
    scale: F32


class Rows(NamedTuple):
    """T rows of activations: float32 [T, K] and, in int8 mode, their quantised twin."""

    x: F32
    int8: Int8Rows | None

    def quantize(self) -> Rows:
        """Fill the int8 twin from the float32 rows (a no-op where there is none)."""
        if self.int8 is not None:
            ops.quantize_activations(self.x, self.int8.q, self.int8.scale)
        return self


class Activations:
    """Input of matrix products: written once as float32, quantised once, read by many products."""

    def __init__(self, max_tokens: int, width: int, *, int8: bool) -> None:
        self._x = np.zeros((max_tokens, width), dtype=np.float32)
        self._int8: Int8Rows | None = None
        if int8 and width % BLOCK == 0:
            self._int8 = Int8Rows(
                np.zeros((max_tokens, width), dtype=np.int8),
                np.zeros((max_tokens, width // BLOCK), dtype=np.float32),
            )
        self._views: dict[int, Rows] = {}

    def at(self, tokens: int) -> Rows:
        """Return the first `tokens` rows as cached views."""
        rows = self._views.get(tokens)
        if rows is None:
            int8 = self._int8
            part = None if int8 is None else Int8Rows(int8.q[:tokens], int8.scale[:tokens])
            rows = self._views[tokens] = Rows(self._x[:tokens], part)
        return rows
