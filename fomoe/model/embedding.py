"""Token ids to the first residual stream."""

from __future__ import annotations

import numpy as np

from fomoe.gguf.rows import StoredRows
from fomoe.kernels.cpu import ops
from fomoe.model.buffers import F32
from fomoe.model.linear import Linear
from fomoe.model.state import I32


class Embedding:
    """Dequantised rows of an embedding matrix in memory."""

    def __init__(self, matrix: Linear) -> None:
        self._matrix = matrix

    def __call__(self, tokens: I32, out: F32) -> None:
        """Write the rows of `tokens` int32 [T] into `out` [T, D]."""
        ops.embed(self._matrix.qtype, self._matrix.weight, tokens, out)


class StoredEmbedding:
    """The same from the file: a row is 2 KB, the matrix of a large model half a gigabyte."""

    def __init__(self, rows: StoredRows, most: int) -> None:
        self._rows = rows
        self._order = np.arange(most, dtype=np.int32)

    def __call__(self, tokens: I32, out: F32) -> None:
        """Write the rows of `tokens` int32 [T] into `out` [T, D]; GGUFError when a read fails."""
        ops.embed(self._rows.qtype, self._rows.read(tokens), self._order[: len(tokens)], out)
