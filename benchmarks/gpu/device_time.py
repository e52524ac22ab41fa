"""Time on a GPU, by its own events, and a kernel that takes a time that one asks for."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence

from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch

PROBE_TICKS = (100_000, 400_000)


def device_ms(gpu: GPU, work: Callable[[], None], rounds: int) -> list[float]:
    """Milliseconds between two events around `work`, which puts things into gpu.stream."""
    start, end = gpu.runtime.event(timing=True), gpu.runtime.event(timing=True)
    times = []
    for _ in range(rounds):
        gpu.runtime.record(start, gpu.stream)
        work()
        gpu.runtime.record(end, gpu.stream)
        gpu.runtime.synchronize(gpu.stream)
        times.append(gpu.runtime.elapsed_ms(start, end))
    return times


def graph_ms(gpu: GPU, launches: Sequence[Launch], rounds: int) -> float:
    """Median milliseconds of a graph of launches."""
    gpu.runtime.begin_capture(gpu.stream)
    for launch in launches:
        gpu.launch(launch)
    graph = gpu.runtime.end_capture(gpu.stream)

    def work() -> None:
        gpu.runtime.run(graph, gpu.stream)

    device_ms(gpu, work, 2)
    median = statistics.median(device_ms(gpu, work, rounds))
    gpu.runtime.drop(graph)
    return median


def queued_ms(
    gpu: GPU, work: Callable[[], None], per_us: float, rounds: int = 9, head_us: float = 5000
) -> float:
    """Median milliseconds of `work` on the device when the host is not what it waits for.

    A delay of `head_us` goes first, during which the host puts all of it into the queue.
    """
    head = delay(gpu, head_us, per_us)
    start, end = gpu.runtime.event(timing=True), gpu.runtime.event(timing=True)
    times = []
    for _ in range(rounds):
        gpu.launch(head)
        gpu.runtime.record(start, gpu.stream)
        work()
        gpu.runtime.record(end, gpu.stream)
        gpu.runtime.synchronize(gpu.stream)
        times.append(gpu.runtime.elapsed_ms(start, end))
    return statistics.median(times)


def ticks_launch(gpu: GPU, ticks: int) -> Launch:
    """A kernel that spins for so many ticks of the device's clock on one wave."""
    function = gpu.kernel("delay", "delay", {})
    return Launch(function, 1, gpu.runtime.wave, 0, [ctypes.c_ulonglong(ticks)])


def ticks_per_us(gpu: GPU) -> float:
    """Speed of the device's clock, from the difference of a long and a short delay."""
    medians = []
    for ticks in PROBE_TICKS:
        launch = ticks_launch(gpu, ticks)
        gpu.launch(launch)
        medians.append(statistics.median(device_ms(gpu, lambda: gpu.launch(launch), 9)))  # noqa: B023
    return (PROBE_TICKS[1] - PROBE_TICKS[0]) / ((medians[1] - medians[0]) * 1e3)


def delay(gpu: GPU, microseconds: float, per_us: float | None = None) -> Launch:
    """A kernel that takes so many microseconds; `per_us` is what `ticks_per_us` returned."""
    return ticks_launch(gpu, round(microseconds * (per_us or ticks_per_us(gpu))))
