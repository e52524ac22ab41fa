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


class Rows(NamedTuple):
    """T rows of activations: float32 [T, K] and, in int8 mode, int8 [T, K] with scales [T, K/32]."""

    x: F32
    q: npt.NDArray[np.int8] | None
    scale: F32 | None

    def quantize(self) -> Rows:
        """Fill the int8 twin from the float32 rows (a no-op where there is none)."""
        if self.q is not None:
            ops.quantize_activations(self.x, self.q, self.scale)
        return self


class Activations:
    """Input of matrix products: written once as float32, quantised once, read by many products."""

    def __init__(self, max_tokens: int, width: int, *, int8: bool) -> None:
        self._x = np.zeros((max_tokens, width), dtype=np.float32)
        self._q: npt.NDArray[np.int8] | None = None
        self._scale: F32 | None = None
        if int8 and width % BLOCK == 0:
            self._q = np.zeros((max_tokens, width), dtype=np.int8)
            self._scale = np.zeros((max_tokens, width // BLOCK), dtype=np.float32)
        self._views: dict[int, Rows] = {}

    def at(self, tokens: int) -> Rows:
        """Return the first `tokens` rows as cached views."""
        rows = self._views.get(tokens)
        if rows is None:
            q = None if self._q is None else self._q[:tokens]
            scale = None if self._scale is None else self._scale[:tokens]
            rows = self._views[tokens] = Rows(self._x[:tokens], q, scale)
        return rows
