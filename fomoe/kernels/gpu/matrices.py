"""Weights in a device's memory: dense matrices, and experts in their slots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import DeviceError
from fomoe.gguf.quants import GGMLType, row_bytes
from fomoe.kernels.gpu.arena import aligned
from fomoe.kernels.gpu.gpu import GPU

# Types that the kernels multiply with; the others of GGMLType run on the CPU only.
TYPES = frozenset(
    (
        GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0, GGMLType.Q5_0,
        GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.IQ4_XS,
    )
)  # fmt: skip


def check_type(qtype: int, what: str) -> GGMLType:
    """Return the type; DeviceError where no kernel has it."""
    names = {int(t): t.name for t in GGMLType}
    if qtype not in TYPES:
        known = ", ".join(sorted(t.name for t in TYPES))
        raise DeviceError(
            f"{what} is of type {names.get(qtype, qtype)}; GPUs have kernels for {known}. "
            "Run this model on cpu devices, or convert the file"
        )
    return GGMLType(qtype)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix [rows, cols] of GGUF blocks at a device address that is a multiple of 256."""

    address: int
    type: int
    rows: int
    cols: int

    @property
    def nbytes(self) -> int:
        """Bytes of its blocks."""
        return self.rows * row_bytes(GGMLType(self.type), self.cols)


def place(gpu: GPU, qtype: int, blocks: npt.NDArray[np.uint8]) -> Matrix:
    """Copy `blocks` uint8 [rows, row_bytes] to the device, as they are.

    Raises:
        DeviceError: the type has no kernel, the rows are no multiple of 32 values, or the memory
            is full.
    """
    kind = check_type(qtype, "a matrix")
    rows, nbytes = blocks.shape
    cols = nbytes // kind.block_bytes * kind.block_elements
    if cols % 32 or nbytes % kind.block_bytes:
        raise DeviceError(f"a matrix of {cols} columns: GPUs multiply rows of whole 32 values")
    address = gpu.arena.take(blocks.nbytes)
    gpu.upload(address, blocks)
    return Matrix(address, int(kind), rows, cols)


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """How gate, up [width, hidden] and down [hidden, width] of one expert lie in a slot.

    `types` are those of gate, up and down. A slot holds the three one after the other as the GGUF
    blocks that a copy brings, each from a multiple of 256 on.
    """

    types: tuple[int, int, int]
    hidden: int
    width: int

    def __post_init__(self) -> None:
        for qtype in self.types:
            check_type(qtype, "an expert")
        if self.hidden % 32 or self.width % 32:
            raise DeviceError(
                f"experts of {self.width} x {self.hidden}: GPUs multiply rows of whole 32 values"
            )

    @property
    def part_bytes(self) -> tuple[int, int, int]:
        """Bytes of gate, up and down."""
        gate, up, down = (GGMLType(t) for t in self.types)
        return (
            self.width * row_bytes(gate, self.hidden),
            self.width * row_bytes(up, self.hidden),
            self.hidden * row_bytes(down, self.width),
        )

    @property
    def offsets(self) -> tuple[int, int, int]:
        """Where gate, up and down begin in a slot."""
        gate, up, _ = self.part_bytes
        return 0, aligned(gate), aligned(gate) + aligned(up)

    @property
    def nbytes(self) -> int:
        """Bytes of a slot, up to the last byte of down."""
        return self.offsets[2] + self.part_bytes[2]
