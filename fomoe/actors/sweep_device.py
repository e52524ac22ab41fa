"""The device's side of a prompt's sweep: waves of experts, ascending, added up as they land."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Fabric, Receiver, Sender
from fomoe.actors.layout import StepViews
from fomoe.actors.messages import DONE, STEP, STEP_ID, STEP_LAST, Tag
from fomoe.engine._engine import landed, part_addresses
from fomoe.kernels.device import Device, ExpertShape, WeightedPairs

MOST_EXPERTS = 32  # of a call: what its work buffers are sized for
LEAST_EXPERTS = 8  # of a call that could wait for more: the thread pool has work for all
_SPIN_US = 50.0  # a read takes milliseconds
_WAIT_MS = 20.0
_SEND_BOUND_S = 5.0

Message = tuple[int, int]  # tag, bytes


@dataclass(frozen=True, slots=True)
class SlotMap:
    """The segment as a device sees it.

    `landed` uint64 [slots] are the landed words; `parts[l]` uint64 [3, E] is where gate, up and
    down of each expert would begin in the first slot, `shapes[l]` their types.
    """

    landed: npt.NDArray[np.uint64]
    parts: Sequence[npt.NDArray[np.uint64]]
    shapes: Sequence[ExpertShape]

    def addresses(self, layer: int, entries: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
        """Return addresses uint64 [3, n] of the parts of a step's entries."""
        parts = np.empty((3, len(entries)), np.uint64)
        part_addresses(self.parts[layer], entries, parts)
        return parts


@dataclass(frozen=True, slots=True)
class DriverLink:
    """The device's ends of its rings to and from the driver, and its step arena."""

    from_driver: Receiver
    to_driver: Sender
    arena: str
    views: tuple[StepViews, ...]


@dataclass(slots=True)
class _Wave:
    """A wave under way."""

    id: int
    layer: int
    tokens: int
    first: int
    count: int
    flags: int
    buffer: int
    done: int = 0
    compute_ns: int = 0
    wait_ns: int = 0


class DeviceSweep:
    """Computes waves as their experts land; waves queue here while one is under way."""

    def __init__(
        self, device: Device, fabric: Fabric, link: DriverLink, slots: SlotMap,
        stopping: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._device = device
        self._fabric = fabric
        self._link = link
        self._slots = slots
        self._stopping = stopping
        self._waves: deque[_Wave] = deque()
        self._ready = np.zeros(max(len(v.entries) for v in link.views), np.uint8)
        self._aborted = -1
        self.experts = 0
        self.compute_ns = 0
        self.wait_ns = 0

    def serve(self, buffer: bytearray) -> Message | None:
        """Compute the wave in `buffer` and those that arrive meanwhile, each answered by DONE.

        Returns:
            A message that is no wave and came in between; its payload is in `buffer`.
        """
        self._take(buffer)
        other: Message | None = None
        while self._waves:
            wave = self._waves[0]
            other = other or self._hear(buffer)
            while wave.done < wave.count and not (other or self._given_up(wave)):
                bell = self._fabric.bell()
                if not self._advance(wave):
                    other = self._hear(buffer)
                    self._wait(bell, wave)
            self._waves.popleft()
            self._answer(wave)
        return other

    def _take(self, buffer: bytearray) -> None:
        step_id, layer, tokens, _, first, count, flags, number = STEP.unpack_from(buffer)
        self._waves.append(_Wave(step_id, layer, tokens, first, count, flags, number))

    def _advance(self, wave: _Wave) -> bool:
        """Compute what has landed, in order, unless waiting for more pays; False if nothing was."""
        first, end = wave.first + wave.done, wave.first + wave.count
        views = self._link.views[wave.buffer]
        entries = views.entries[first:end]
        ready = self._ready[: end - first]
        count = landed(self._slots.landed, entries, ready)
        there = int(ready.argmin()) if count < len(ready) else count
        if there < min(LEAST_EXPERTS, len(ready)):
            return False
        started = time.perf_counter_ns()
        if first == 0:
            views.out[: wave.tokens] = 0.0
        for a in range(first, first + there, MOST_EXPERTS):
            self._add(wave, views, a, min(a + MOST_EXPERTS, first + there))
        wave.done += there
        wave.compute_ns += time.perf_counter_ns() - started
        return True

    def _add(self, wave: _Wave, views: StepViews, a: int, b: int) -> None:
        """Add entries a..b, whose pairs lie one behind the other, to the result."""
        pair_start = views.pair_start[a : b + 1]
        first, end = int(pair_start[0]), int(pair_start[-1])
        pairs = WeightedPairs(pair_start - first, views.pair_token[first:end],
                              views.weights.reshape(-1)[first:end])  # fmt: skip
        self._device.experts_sum(
            self._slots.shapes[wave.layer], self._slots.addresses(wave.layer, views.entries[a:b]),
            views.x[: wave.tokens], pairs, views.out[: wave.tokens],
        )  # fmt: skip

    def _given_up(self, wave: _Wave) -> bool:
        return wave.id == self._aborted or self._stopping()

    def _hear(self, buffer: bytearray) -> Message | None:
        """Take what the driver sent; returns a message that is no wave."""
        while (message := self._link.from_driver.try_recv(buffer)) is not None:
            if message[0] == Tag.SWEEP:
                self._take(buffer)
            elif message[0] == Tag.ABORT:
                self._aborted = STEP_ID.unpack_from(buffer)[0]
            else:
                return message
        return None

    def _wait(self, bell: int, wave: _Wave) -> None:
        """Wait until something lands or the driver says something."""
        started = time.perf_counter_ns()
        self._fabric.wait(bell, _SPIN_US, _WAIT_MS)
        wave.wait_ns += time.perf_counter_ns() - started

    def _answer(self, wave: _Wave) -> None:
        complete = wave.done == wave.count
        regions: tuple[tuple[str, int, int], ...] = ()
        if complete and wave.flags & STEP_LAST:
            views = self._link.views[wave.buffer]
            regions = ((self._link.arena, views.offsets["out"], views.out[: wave.tokens].nbytes),)
        self.experts += wave.done
        self.compute_ns += wave.compute_ns
        self.wait_ns += wave.wait_ns
        payload = DONE.pack(wave.id, not complete, wave.done, wave.compute_ns, wave.wait_ns)
        self._link.to_driver.send(Tag.DONE, payload, regions, _SEND_BOUND_S)
