"""A weight matrix in its GGUF blocks and its product with activations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import GGUFError
from fomoe.gguf.quants import GGMLType
from fomoe.gguf.reader import GGUFFile
from fomoe.gguf.rows import StoredRows
from fomoe.kernels.cpu import ops
from fomoe.model.buffers import F32, Rows


@dataclass(frozen=True, slots=True)
class Linear:
    """y = W x with W uint8 [rows, row_bytes] of type `qtype`, `cols` values per row."""

    weight: npt.NDArray[np.uint8]
    qtype: int
    rows: int
    cols: int

    def __call__(self, x: Rows, out: F32) -> F32:
        """Write W x into `out` [T, rows]: int8 activations where `x` has them, else float32."""
        if x.int8 is None or self.qtype in _FLOAT_TYPES:
            ops.matmul_f32(self.qtype, self.weight, x.x, out)
        else:
            ops.matmul_q8(self.qtype, self.weight, x.int8.q, x.int8.scale, out)
        return out


def operands(weights: object) -> dict[str, object]:
    """Return a layer's weights by field name as the native layers take them.

    Matrices become (type, uint8 [rows, row_bytes]), vectors stay float32 arrays.
    """
    values = {name: getattr(weights, name) for name in weights.__slots__}  # type: ignore[attr-defined]
    return {
        name: (value.qtype, value.weight) if isinstance(value, Linear) else value
        for name, value in values.items()
    }


_FLOAT_TYPES = frozenset((GGMLType.F32, GGMLType.F16, GGMLType.BF16))


class Weights:
    """Reads the dense tensors of a GGUF file with their shapes checked."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file

    def has(self, name: str) -> bool:
        """Whether the file holds the tensor."""
        return name in self.file.tensors

    def linear(self, name: str, rows: int, cols: int) -> Linear:
        """Return tensor `name` as a matrix [rows, cols]; a vector counts as one row."""
        info = self._info(name)
        shape = info.shape if len(info.shape) > 1 else (1, *info.shape)
        self._check(name, shape, (rows, cols))
        return Linear(self.file.read(name).reshape(rows, -1), int(info.type), rows, cols)

    def stored(self, name: str, rows: int, cols: int, most: int) -> StoredRows:
        """Return matrix `name` [rows, cols] as rows that are read when wanted, `most` at a time."""
        self._check(name, self._info(name).shape, (rows, cols))
        return self.file.rows(name, most)

    def vector(self, name: str, size: int) -> F32:
        """Return tensor `name` as float32 [size]."""
        self._check(name, self._info(name).shape, (size,))
        return np.ascontiguousarray(self.file.read_f32(name).reshape(size), dtype=np.float32)

    def matrix(self, name: str, rows: int, cols: int) -> F32:
        """Return tensor `name` as float32 [rows, cols]."""
        self._check(name, self._info(name).shape, (rows, cols))
        return np.ascontiguousarray(self.file.read_f32(name).reshape(rows, cols), dtype=np.float32)

    def _info(self, name: str):  # type: ignore[no-untyped-def]
        info = self.file.tensors.get(name)
        if info is None:
            raise GGUFError(self.file.path, name, 0, "tensor is missing", "convert the model again")
        return info

    def _check(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found != wanted:
            raise GGUFError(
                self.file.path,
                name,
                self.file.tensors[name].offset,
                f"shape is {found}, the metadata ask for {wanted}",
                "the file is inconsistent: convert the model again",
            )
