"""Storage's CPU kernels beside GPUs: experts of a token, computed where they lie in the segment.

What is computed, and what becomes of the sum, says `fomoe.actors.layer_arm`.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Fabric, load_acquire_u64, store_release_u64
from fomoe.actors.expert_parts import segment_parts
from fomoe.actors.messages import ARM
from fomoe.engine._engine import landed, part_addresses
from fomoe.engine.transfers import ENTRY
from fomoe.errors import StorageError
from fomoe.gguf.extents import ExpertTable
from fomoe.kernels.device import Device, ExpertShape, open_device

_LOOK_US = 50.0  # between two looks at bytes that a device brings: it rings nobody
_BOUND_S = 60.0
_F32 = np.dtype(np.float32)

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ArmPlace:
    """A device's part of it: its process, its arena, and where in it input, sum and word begin."""

    name: str
    arena: str
    input: int
    sum: int
    word: int


@dataclass(frozen=True, slots=True)
class ArmPlan:
    """What storage computes with: devices by number, shapes of the model, kernels' threads."""

    places: tuple[ArmPlace, ...]
    hidden: int
    width: int
    top_k: int
    int8: bool
    threads: int


@dataclass(frozen=True, slots=True)
class ArmSegment:
    """The segment as storage sees it: landed words uint64 [slots], where its first slot begins."""

    landed: npt.NDArray[np.uint64]
    address: int


@dataclass(frozen=True, slots=True)
class _Job:
    """Experts of a step; `until` is when they must have landed."""

    step: int
    layer: int
    device: int
    weights: npt.NDArray[np.float32]
    entries: npt.NDArray[np.void]
    until: float


class Experts:
    """Computes experts of the segment on one row; arrays are made once.

    Attributes:
        top_k, hidden: of the model: at most so many experts on so long a row.
    """

    def __init__(self, plan: ArmPlan, table: ExpertTable, address: int) -> None:
        self._device: Device = open_device("cpu", threads=plan.threads, int8=plan.int8)
        self.top_k, self.hidden = plan.top_k, plan.hidden
        k, layers = plan.top_k, range(table.n_layers)
        self._parts = segment_parts(table, address)
        self._shapes = [ExpertShape.of(table, i, plan.hidden, plan.width) for i in layers]
        self._addresses = np.zeros(3 * k, np.uint64)
        self._starts, self._order = np.arange(k + 1, dtype=np.int32), np.arange(k, dtype=np.int32)
        self._token = np.zeros(k, np.int32)
        self._pairs = np.zeros((k, plan.hidden), np.float32)

    def run(
        self, layer: int, entries: npt.NDArray[np.void], weights: npt.NDArray[np.float32],
        x: npt.NDArray[np.float32], out: npt.NDArray[np.float32],
    ) -> None:  # fmt: skip
        """Write to out [1, D] the weighted sum of `entries` on x [1, D], a chain of fma from 0."""
        n = len(entries)
        addresses = self._addresses[: 3 * n].reshape(3, n)
        part_addresses(self._parts[layer], entries, addresses)
        self._device.experts(
            self._shapes[layer], addresses, x, self._starts[: n + 1], self._token[:n],
            self._pairs[:n],
        )  # fmt: skip
        self._device.reduce(self._pairs[:n], self._order[None, :n], weights[None], out)


class ProcessorArm:
    """Serves ARM messages in their order; used by one thread, blocked while experts are computed.

    Attributes:
        kernels: what computes.
        experts: computed so far, in `compute_ns` nanoseconds.
    """

    def __init__(
        self, plan: ArmPlan, table: ExpertTable, segment: ArmSegment, fabric: Fabric
    ) -> None:
        self._segment, self._fabric = segment, fabric
        self.kernels = Experts(plan, table, segment.address)
        self._places = plan.places
        row = _F32.itemsize * plan.hidden
        arenas = [fabric.arena(place.arena) for place in plan.places]
        cut = list(zip(arenas, plan.places, strict=True))
        self._inputs = [a[p.input :][:row].view(_F32)[None] for a, p in cut]
        self._sums = [a[p.sum :][:row].view(_F32)[None] for a, p in cut]
        self._words = [a[p.word :][:8].view(np.uint64) for a, p in cut]
        self._ready = np.zeros(plan.top_k, np.uint8)
        self._jobs: deque[_Job] = deque()
        self.experts = 0
        self.compute_ns = 0

    def take(self, message: U8) -> None:
        """Take an ARM message."""
        step, layer, device, count = ARM.unpack_from(message.data)
        weights = np.frombuffer(message, _F32, count, ARM.size).copy()
        entries = np.frombuffer(message, ENTRY, count, ARM.size + weights.nbytes).copy()
        until = time.monotonic() + _BOUND_S
        self._jobs.append(_Job(step, layer, device, weights, entries, until))

    def give_up(self, step: int) -> None:
        """Compute nothing for steps up to this one; their sums are nobody's."""
        while self._jobs and self._jobs[0].step <= step:
            self._answer(self._jobs.popleft())

    def advance(self) -> bool:
        """Compute what has landed; returns whether there was something to compute or to wait for.

        Raises:
            StorageError: bytes have not come within a minute.
        """
        if not self._jobs:
            return False
        job, bell = self._jobs[0], self._fabric.bell()
        ready = self._ready[: len(job.entries)]
        if landed(self._segment.landed, job.entries, ready) < len(ready):
            if time.monotonic() > job.until:
                missing = job.entries["expert"][ready == 0].tolist()
                raise StorageError(
                    f"layer {job.layer}: experts {missing} have not come into RAM within "
                    f"{_BOUND_S:.0f} s"
                )
            self._fabric.wait(bell, _LOOK_US, 0.0)
            return True
        self._jobs.popleft()
        started = time.perf_counter_ns()
        self.kernels.run(
            job.layer, job.entries, job.weights, self._inputs[job.device], self._sums[job.device]
        )
        self._answer(job)
        self.experts += len(job.entries)
        self.compute_ns += time.perf_counter_ns() - started
        return True

    def _answer(self, job: _Job) -> None:
        word = self._words[job.device]
        store_release_u64(word, 0, max(job.step, load_acquire_u64(word, 0)))
        self._fabric.ring(self._places[job.device].name)
