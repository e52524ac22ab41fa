"""Kernels of many launches compiled side by side, before the first is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fomoe.kernels.gpu.gpu import GPU

Job = tuple[str, dict[str, int]]
Built = TypeVar("Built")


def rehearse(gpu: GPU, build: Callable[[], Built]) -> tuple[list[Job], Built]:
    """Return units and defines of the launches that `build` makes, and what it returned.

    Nothing is compiled, so that these launches cannot run.

    Raises:
        DeviceError: what the builders of launches refuse.
    """
    jobs: list[Job] = []
    kernel = gpu.kernel

    def note(unit: str, name: str, defines: dict[str, int]) -> int:
        jobs.append((unit, defines))
        return 0

    gpu.kernel = note  # type: ignore[method-assign, assignment]
    try:
        return jobs, build()
    finally:
        gpu.kernel = kernel  # type: ignore[method-assign]
