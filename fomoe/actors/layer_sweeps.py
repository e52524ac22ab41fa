"""A prompt's chunk through the experts of a hosted layer that do not all fit its device."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fomoe.actors.layer_link import LayerLink
from fomoe.actors.layer_traffic import LayerTraffic
from fomoe.actors.messages import Do, Priority
from fomoe.engine.copies import COPY, CopyKind
from fomoe.engine.gpu_segment import GpuSegment
from fomoe.engine.gpu_sweep import order_again, order_wave
from fomoe.engine.placed import Placed
from fomoe.engine.transfers import ENTRY
from fomoe.errors import PeerStalledError
from fomoe.residency import ChunkUse, Sweep
from fomoe.routing import Route, group_by_expert
from fomoe.types import Tier

WAVE = 16  # experts of a wave
_STALL_S = 120.0
MOST_IN_FLIGHT = 8  # waves: loads of later ones go on while one is computed

_Records = npt.NDArray[np.void]
_NONE = np.empty(0, COPY), np.empty(0, ENTRY)


class WaveHost(Protocol):
    """What a sweep needs of the driver's layer host."""

    def send_wave(self, layer: int, what: int, orders: tuple[_Records, _Records]) -> int:
        """Send a part of a layer's work, with copies and entries; returns the step's id."""

    def hear(self, layer: int, experts: npt.NDArray[np.int32]) -> None:
        """Take what devices and storage say; waits some milliseconds where that is nothing.

        Raises:
            StorageError: an expert could not be read; nothing is under way any more.
        """


@dataclass(slots=True)
class _Flight:
    """Waves that a device has not answered: the step, where the wave ends, its copies."""

    waves: deque[tuple[int, int, _Records]] = field(default_factory=deque)


class LayerSweeps:
    """Runs sweeps to their end, one after the other."""

    def __init__(self, host: WaveHost, placed: Placed, traffic: LayerTraffic) -> None:
        self._host = host
        self._placed = placed
        self._traffic = traffic

    def run(self, layer: int, route: Route, link: LayerLink) -> None:
        """Bring and run every expert of the chunk's route; the layer is still to be combined.

        Raises:
            StorageError: an expert could not be read.
        """
        placed = self._placed
        segment, use = placed.segment_of(layer), _use(route)
        sweep = Sweep(placed.residency, layer, use, borrows=True)
        self._count(layer, sweep, use.pairs)
        again = order_again(segment, sweep)
        self._traffic.reads.came_true(layer, use.experts)
        self._traffic.reads.ask(layer, again, Priority.DEMAND)
        flight = _Flight()
        self._host.send_wave(layer, Do.GATHER, _NONE)
        try:
            moved = time.monotonic()
            while not sweep.is_done:
                while self._send(sweep, segment, flight):
                    moved = time.monotonic()
                if not self._take(sweep, segment, flight, link):
                    self._host.hear(layer, use.experts)
                if time.monotonic() - moved > _STALL_S:
                    raise PeerStalledError(link.name, _STALL_S)
        finally:
            while self._take(sweep, segment, flight, link):
                pass
            sweep.abandon()

    def _send(self, sweep: Sweep, segment: GpuSegment, flight: _Flight) -> bool:
        """Send the next wave, if there is room for it; returns whether there was."""
        placed, layer = self._placed, sweep.layer
        if len(flight.waves) == MOST_IN_FLIGHT:
            return False
        wave = sweep.next_wave(WAVE, segment.read_room(layer, placed.residency))
        if wave is None:
            return False
        orders = order_wave(segment, placed.residency, sweep, wave)
        self._traffic.reads.ask(layer, orders.reads, Priority.DEMAND)
        step = self._host.send_wave(layer, Do.WAVE, (orders.copies, orders.entries))
        flight.waves.append((step, wave.end, orders.copies))
        loads = orders.copies["kind"] == CopyKind.LOAD
        placed.counters.ram_bytes += int(orders.copies["nbytes"][loads].sum())
        return True

    def _take(self, sweep: Sweep, segment: GpuSegment, flight: _Flight, link: LayerLink) -> bool:
        """Take note of the first wave if the device has answered it; returns whether it has.

        One at a time, and only where no other can be sent: what is in memory after a prompt does
        not depend on when its waves are answered.
        """
        if not flight.waves or flight.waves[0][0] > link.answered:
            return False
        step, end, copies = flight.waves.popleft()
        aborted = step in link.given_up
        segment.end_all(copies, self._placed.residency, aborted=aborted)
        if not aborted:
            sweep.computed(end)
        return True

    def _count(self, layer: int, sweep: Sweep, pairs: npt.NDArray[np.int64]) -> None:
        """Count the chunk's activations by the tier that their bytes came from."""
        counters, arrays = self._placed.counters, self._placed.planner.arrays
        sources = sweep.sources.copy()
        guessed = arrays.unproven[layer, sweep.experts]
        paid = arrays.background[layer, sweep.experts]
        early = (guessed != Tier.DEVICE) & (sources != Tier.NVME) & ~paid
        sources[early] = guessed[early]
        by_tier = np.bincount(sources, weights=pairs, minlength=len(Tier))
        counters.prompt_hits_device += int(by_tier[Tier.DEVICE])
        counters.prompt_hits_ram += int(by_tier[Tier.RAM])
        counters.prompt_reads_nvme += int(by_tier[Tier.NVME])


def _use(route: Route) -> ChunkUse:
    """Return what the chunk wants; a group's tokens ascend, so its last pair is its last token."""
    groups = group_by_expert(route.ids)
    pairs = np.diff(groups.pair_start).astype(np.int64)
    last = groups.pair_token[groups.pair_start[1:] - 1].astype(np.int64)
    return ChunkUse(len(route.ids), groups.experts, pairs, last)
