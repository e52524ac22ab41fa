"""Work that is queued the same way every time: launches and copies, replayed as one graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from fomoe.errors import DeviceError
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.runtime import Graph

_AHEAD = 8  # runs that keep a device busy while the host queues launches to be timed


@dataclass(frozen=True, slots=True)
class Step:
    """A launch, or a copy as the call that queues it, and what it is called in a waterfall."""

    name: str
    work: Launch | Callable[[], None]

    def queue(self, gpu: GPU) -> None:
        """Put it behind what the compute stream has."""
        if isinstance(self.work, Launch):
            gpu.runtime.launch(self.work, gpu.stream)
        else:
            self.work()


class Program:
    """Steps in their order, as one graph where asked for: what they read changes in memory only."""

    def __init__(self, gpu: GPU, steps: Sequence[Step], *, graphs: bool) -> None:
        self.steps = tuple(steps)
        self._gpu = gpu
        self._graph: Graph | None = None
        self._graphs = graphs

    def run(self) -> None:
        """Queue all of it; the first run captures it."""
        if not self._graphs:
            for step in self.steps:
                step.queue(self._gpu)
            return
        if self._graph is None:
            self._graph = self._capture()
        self._gpu.runtime.run(self._graph, self._gpu.stream)

    def _capture(self) -> Graph:
        runtime, stream = self._gpu.runtime, self._gpu.stream
        runtime.begin_capture(stream)
        try:
            for step in self.steps:
                step.queue(self._gpu)
        except DeviceError:
            with suppress(DeviceError):  # the stream is to be of use afterwards
                runtime.end_capture(stream)
            raise
        return runtime.end_capture(stream)

    @property
    def n_launches(self) -> int:
        """Kernels that a run launches; copies are not counted."""
        return sum(isinstance(step.work, Launch) for step in self.steps)


def time_steps(gpu: GPU, program: Program) -> list[tuple[str, float]]:
    """Return name and microseconds on the device of each step of a program, one after the other.

    Whole runs come first and keep the device busy while the host queues the steps: without them the
    time of a short launch would be the host's.
    """
    runtime, stream, steps = gpu.runtime, gpu.stream, program.steps
    events = [runtime.event(timing=True) for _ in range(len(steps) + 1)]
    for _ in range(_AHEAD):
        program.run()
    runtime.record(events[0], stream)
    for step, event in zip(program.steps, events[1:], strict=True):
        step.queue(gpu)
        runtime.record(event, stream)
    runtime.synchronize(stream)
    times = [1e3 * runtime.elapsed_ms(first, second) for first, second in pairwise(events)]
    return [(step.name, time) for step, time in zip(steps, times, strict=True)]


def time_program(gpu: GPU, program: Program, count: int) -> float:
    """Return the milliseconds of a run where the device never waits for the host."""
    runtime, stream = gpu.runtime, gpu.stream
    first, last = runtime.event(timing=True), runtime.event(timing=True)
    program.run()
    runtime.record(first, stream)
    for _ in range(count):
        program.run()
    runtime.record(last, stream)
    runtime.synchronize(stream)
    return runtime.elapsed_ms(first, last) / count
