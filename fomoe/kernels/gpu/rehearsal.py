"""Builders' run-through without a device: which kernels they want, how much memory they take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fomoe.kernels.gpu.arena import ALIGN, aligned
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.runtime import Runtime


class _Counting:
    """An arena of nothing: counts what is taken; addresses are those of no memory."""

    def __init__(self) -> None:
        self.used = 0

    def take(self, nbytes: int, align: int = ALIGN) -> int:
        start = aligned(self.used, align)
        self.used = start + nbytes
        return start


class _Still:
    """A device's properties; what would touch its memory is left out."""

    def __init__(self, runtime: Runtime) -> None:
        self.name, self.target = runtime.name, runtime.target
        self.wave, self.cores = runtime.wave, runtime.cores
        self.shared_bytes = runtime.shared_bytes

    def fill(self, to: int, byte: int, nbytes: int, stream: int) -> None:
        """Nothing lies there."""

    def synchronize(self, stream: int) -> None:
        """Nothing is under way."""


class Rehearsal(GPU):
    """Stands in for a GPU while launches are built once before; they may not be launched.

    Attributes:
        jobs: (unit, defines) of every kernel asked for, for `GPU.prepare`.
    """

    def __init__(self, gpu: GPU) -> None:  # no memory, no stream: the parent's are not wanted
        self.runtime: Any = _Still(gpu.runtime)
        self.arena: Any = _Counting()
        self.stream = 0
        self.jobs: list[tuple[str, Mapping[str, int]]] = []

    def kernel(self, unit: str, name: str, defines: Mapping[str, int]) -> int:
        """Note the unit; returns no function."""
        self.jobs.append((unit, defines))
        return 0
