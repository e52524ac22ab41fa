"""Work that is queued the same way every time: launches and copies, replayed as one graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.runtime import Graph


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
        for step in self.steps:
            step.queue(self._gpu)
        return runtime.end_capture(stream)

    @property
    def n_launches(self) -> int:
        """Kernels that a run launches; copies are not counted."""
        return sum(isinstance(step.work, Launch) for step in self.steps)


def time_steps(gpu: GPU, steps: Sequence[Step], ahead: Callable[[], None]) -> list[float]:
    """Return the microseconds that each step took on the device, one after the other.

    `ahead` queues work that keeps the device busy while the host queues the steps: without it the
    time of a short launch would be the host's.
    """
    runtime, stream = gpu.runtime, gpu.stream
    events = [runtime.event(timing=True) for _ in range(len(steps) + 1)]
    ahead()
    runtime.record(events[0], stream)
    for step, event in zip(steps, events[1:], strict=True):
        step.queue(gpu)
        runtime.record(event, stream)
    runtime.synchronize(stream)
    return [1e3 * runtime.elapsed_ms(first, second) for first, second in pairwise(events)]
