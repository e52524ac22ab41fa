"""What a compute device must do for the experts of a layer; no kernel knows who asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from fomoe.gguf.extents import ExpertTable

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """GGML types of gate, up and down; hidden size D; expert width F."""

    types: tuple[int, int, int]
    hidden: int
    width: int

    @classmethod
    def of(cls, table: ExpertTable, layer: int, hidden: int, width: int) -> ExpertShape:
        """Return what a device must know of a layer's experts."""
        gate, up, down = table.types(layer)
        return cls((int(gate), int(up), int(down)), hidden, width)


class WeightedPairs(NamedTuple):
    """(Expert, token) pairs, sorted by expert: those of expert i are start[i] to start[i + 1].

    `start` int32 [n + 1], `token` int32 [P] and the router's `weight` float32 [P].
    """

    start: I32
    token: I32
    weight: F32


class Device(Protocol):
    """Computes routed experts where their blocks lie."""

    name: str
    is_emulated: bool  # a CPU that stands in for a GPU

    def experts(
        self, shape: ExpertShape, addresses: U64, x: F32, pair_start: I32, pair_token: I32,
        pairs: F32,
    ) -> None:  # fmt: skip
        """Write pairs [P, D]: expert i's output for tokens `pair_token[pair_start[i]:...]`.

        `addresses` uint64 [3, n] are those of gate, up and down; `x` float32 [T, D].
        """

    def experts_sum(
        self, shape: ExpertShape, addresses: U64, x: F32, pairs: WeightedPairs, out: F32
    ) -> None:
        """Add the weighted outputs of `experts` to out [T, D], for prompts.

        Each output is a chain of float32 fma over its token's pairs in their order; from zero, and
        with experts in ascending id, the bits are those of `experts` and `reduce`.
        """

    def reduce(self, pairs: F32, order: I32, weights: F32, out: F32) -> None:
        """Write out [T, D]: float32 fma over each token's pairs in the order given."""


def open_device(name: str, *, threads: int, int8: bool) -> Device:
    """Return the device of a name (`cpu`, `cpu:N`); DeviceError for what is not there."""
    from fomoe.errors import DeviceError
    from fomoe.kernels.cpu.device import CpuDevice

    kind = name.partition(":")[0]
    if kind == "cpu":
        return CpuDevice(name, threads=threads, int8=int8)
    raise DeviceError(f"device {name!r}: only cpu devices compute experts alone; use cpu")
