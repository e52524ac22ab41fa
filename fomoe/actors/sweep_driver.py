"""The driver's side of a prompt's sweep: reads go out as slots come free, waves as reads go out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Fabric, Regions
from fomoe.actors.layout import StepArena
from fomoe.actors.messages import (
    DONE,
    STEP,
    STEP_FIRST,
    STEP_ID,
    STEP_LAST,
    Priority,
    Tag,
)
from fomoe.actors.reads import SEND_BOUND_S, Reads
from fomoe.actors.step import DeviceLink, NodeLink
from fomoe.engine.meter import HostCounters
from fomoe.errors import PeerStalledError, StorageError
from fomoe.model.buffers import F32
from fomoe.residency import ChunkUse, Placement, Residency, Sweep, Wave, guess_ahead
from fomoe.routing import ExpertGroups, Route, group_by_expert
from fomoe.types import ExpertKey, Tier

WAVE = 16  # experts of a wave: the device computes them in few calls, and slots come back early
MOST_IN_FLIGHT = 40  # waves; a ring of the fabric holds more messages
_SPIN_US = 50.0  # a wave takes tens of milliseconds
_WAIT_MS = 20.0
_WAVE_BOUND_S = 120.0


class SweepHost(Protocol):
    """What a sweep needs of the driver's expert host."""

    counters: HostCounters
    residency: Residency
    fabric: Fabric
    reads: Reads

    def next_step(self) -> int:
        """Return the id of a new step."""

    def device_of(self, layer: int) -> DeviceLink:
        """Return the device that computes the layer."""


@dataclass(slots=True)
class _Running:
    """The sweep under way; `in_flight` holds the end of each wave that the device has to answer."""

    sweep: Sweep
    layer: int
    tokens: int
    id: int
    device: DeviceLink
    node: NodeLink
    buffer: int
    pairs: npt.NDArray[np.int64]
    in_flight: deque[int] = field(default_factory=deque)


class PromptSweeps:
    """Runs the layers of prompt chunks; one sweep is under way at a time.

    Attributes:
        checkpoint: called while waiting; what it raises ends the sweep.
    """

    def __init__(self, host: SweepHost, top_k: int) -> None:
        self.checkpoint: Callable[[], None] = _nothing
        self._host = host
        self._top_k = top_k
        self._buffer = bytearray(host.fabric.spec.slot_bytes)
        self._running: _Running | None = None
        self._opened = 0  # tokens of a chunk whose first sweep has not begun
        self._ahead: dict[int, npt.NDArray[np.bool_]] = {}  # expected, by layer

    @property
    def active(self) -> bool:
        """Whether a sweep has begun and not ended."""
        return self._running is not None

    @property
    def takes_guesses(self) -> bool:
        """Whether a chunk is under way."""
        return self.active or self._opened > 0

    def open(self, tokens: int) -> None:
        """Begin a chunk: `look_ahead` may be called for its first layers."""
        self.abandon()
        self._opened = tokens

    def begin(self, layer: int, h: F32, route: Route) -> None:
        """Decide the sweep, send its first reads and waves."""
        host = self._host
        self.abandon()
        groups = group_by_expert(route.ids)
        use = _use(groups, len(route.ids))
        host.reads.failures(layer, use.experts)  # an expert whose read failed must be read again
        sweep = Sweep(host.residency, layer, use)
        device, step_id = host.device_of(layer), host.next_step()
        running = _Running(sweep, layer, len(route.ids), step_id, device, host.reads.node_of(layer),
                           step_id % StepArena.BUFFERS, use.pairs)  # fmt: skip
        self._write(running, h, route, groups)
        self._running = running
        self._count_sources(running)
        host.reads.prove(layer, use.experts[sweep.sources != Tier.NVME])
        self._advance(running)

    def may_guess(self, layer: int) -> bool:
        """Whether a look-ahead at the layer finds slots: one layer of each pool can have them."""
        members = self._host.residency.members(layer)
        return self.takes_guesses and not any(other in members for other in self._ahead)

    def look_ahead(self, layer: int, expected: npt.NDArray[np.bool_]) -> None:
        """Read what `layer` will probably want, bool [E], when the disk has nothing better to do.

        Never waits; goes on while the sweep under way ends.
        """
        self._ahead[layer] = expected
        self._guess(layer)

    def finish(self) -> F32:
        """Wait for the sweep begun last; returns the routed sum float32 [T, D].

        Raises:
            StorageError: a read failed, or the device gave up.
            PeerStalledError: the device did not answer in time.
        """
        running = self._running
        assert running is not None
        deadline = time.monotonic() + _WAVE_BOUND_S
        while not running.sweep.is_done:
            bell = self._host.fabric.bell()
            if self._receive(running):
                self._advance(running)
                deadline = time.monotonic() + _WAVE_BOUND_S
                continue
            self._watch(running)
            if time.monotonic() > deadline:
                raise PeerStalledError(running.device.name, _WAVE_BOUND_S)
            self._host.fabric.wait(bell, _SPIN_US, _WAIT_MS)
        self._running = None
        return running.device.buffers[running.buffer].views.out[: running.tokens]

    def abandon(self) -> None:
        """End the sweep under way, if any: when this returns, the device reads no slot for it.

        Raises:
            PeerStalledError: the device did not answer in time.
        """
        running, self._running = self._running, None
        self._ahead, self._opened = {}, 0
        if running is None or not running.in_flight:
            return
        device = running.device
        device.sender.send(Tag.ABORT, STEP_ID.pack(running.id), (), SEND_BOUND_S)
        deadline = time.monotonic() + _WAVE_BOUND_S
        while running.in_flight:
            bell = self._host.fabric.bell()
            if self._receive(running):
                continue
            if time.monotonic() > deadline:
                raise PeerStalledError(device.name, _WAVE_BOUND_S)
            self._host.fabric.wait(bell, _SPIN_US, _WAIT_MS)

    def _watch(self, running: _Running) -> None:
        """End the sweep when one of its reads failed or the checkpoint says so."""
        failed = self._host.reads.failures(running.layer, running.sweep.experts)
        try:
            if failed:
                raise StorageError(failed[0].message)
            self.checkpoint()
        except BaseException:
            self.abandon()
            raise

    def _receive(self, running: _Running) -> bool:
        """Take one answer of the device; those of steps that were given up are passed over."""
        while running.device.receiver.try_recv(self._buffer) is not None:
            step_id, aborted, _, computed_ns, waited_ns = DONE.unpack_from(self._buffer)
            if step_id == running.id:
                self._host.counters.compute_s += computed_ns / 1e9
                self._host.counters.stall_s += waited_ns / 1e9
                end = running.in_flight.popleft()
                if not aborted:
                    running.sweep.computed(end)
                return True
        return False

    def _advance(self, running: _Running) -> None:
        """Send what has room: reads, then the wave; when all is sent, the next layer's reads."""
        while len(running.in_flight) < MOST_IN_FLIGHT:
            wave = running.sweep.next_wave(WAVE)
            if wave is None:
                break
            self._send(running, wave)
        for layer in self._ahead:
            if layer in self._host.residency.members(running.layer):
                self._guess(layer)  # other pools get no more room from this sweep

    def _send(self, running: _Running, wave: Wave) -> None:
        self._read(running.layer, wave.dropped, wave.placed, Priority.DEMAND)
        views = running.device.buffers[running.buffer].views
        experts = running.sweep.experts[wave.first : wave.end]
        entries = views.entries[wave.first : wave.end]
        entries["slot"], entries["address"], entries["generation"] = running.node.slots.locate(
            running.layer, experts
        )
        entries["expert"] = experts
        last = wave.end == len(running.sweep.experts)
        flags = (0 if wave.first else STEP_FIRST) | (STEP_LAST if last else 0)
        payload = STEP.pack(running.id, running.layer, running.tokens, self._top_k, wave.first,
                            wave.end - wave.first, flags, running.buffer)  # fmt: skip
        running.device.sender.send(Tag.SWEEP, payload, _regions(running, wave), SEND_BOUND_S)
        running.in_flight.append(wave.end)

    def _guess(self, layer: int) -> None:
        host, expected, running = self._host, self._ahead[layer], self._running
        if running is None:
            guess = guess_ahead(host.residency, layer, expected, self._opened)
        else:
            guess = running.sweep.guess(layer, expected)
        self._read(layer, guess.dropped, guess.placed, Priority.PREFETCH)
        for place in guess.placed:
            host.reads.guess(layer, place.key.expert)
        host.counters.prefetch_issued += len(guess.placed)

    def _read(self, layer: int, dropped: tuple[ExpertKey, ...], placed: tuple[Placement, ...],
              priority: Priority) -> None:  # fmt: skip
        """Carry out what the sweep decided: slots of the dropped go back, the placed are read."""
        host, slots = self._host, self._host.reads.node_of(layer).slots
        for key in dropped:
            host.reads.evict(key.layer, key.expert)
            slots.forget(key)
        host.reads.ask(layer, slots.fill(placed), priority)

    def _count_sources(self, running: _Running) -> None:
        """Count the chunk's activations by the tier that their bytes came from."""
        counters, layer = self._host.counters, running.layer
        sources = running.sweep.sources.copy()
        experts = running.sweep.experts
        guessed = self._host.reads.unproven[layer, experts]
        paid = self._host.reads.background[layer, experts]  # when it was wanted in a decode step
        early = (guessed != Tier.DEVICE) & (sources != Tier.NVME) & ~paid
        sources[early] = guessed[early]
        by_tier = np.bincount(sources, weights=running.pairs, minlength=len(Tier))
        counters.prompt_hits_device += int(by_tier[Tier.DEVICE])
        counters.prompt_hits_ram += int(by_tier[Tier.RAM])
        counters.prompt_reads_nvme += int(by_tier[Tier.NVME])

    def _write(self, running: _Running, h: F32, route: Route, groups: ExpertGroups) -> None:
        """Write the chunk into the step arena: rows, pairs by expert, a weight for each pair."""
        views, n_pairs = running.device.buffers[running.buffer].views, len(groups.pair_token)
        np.copyto(views.x[: running.tokens], h)
        views.pair_start[: len(groups.pair_start)] = groups.pair_start
        views.pair_token[:n_pairs] = groups.pair_token
        views.weights.reshape(-1)[groups.order.ravel()] = groups.arrange(route.weights).ravel()


def _use(groups: ExpertGroups, tokens: int) -> ChunkUse:
    """Return what the chunk wants; a group's tokens ascend, so its last pair is its last token."""
    pairs = np.diff(groups.pair_start).astype(np.int64)
    last = groups.pair_token[groups.pair_start[1:] - 1].astype(np.int64)
    return ChunkUse(tokens, groups.experts, pairs, last)


def _regions(running: _Running, wave: Wave) -> Regions:
    """Return the arena ranges that the device must see for a wave."""
    views = running.device.buffers[running.buffer].views
    buffer = running.device.buffers[running.buffer]
    at, name, size = views.offsets, buffer.arena, views.entries.itemsize
    entries = (name, at["entries"] + wave.first * size, (wave.end - wave.first) * size)
    if wave.first:
        return (entries,)
    pairs = running.tokens * views.weights.shape[1]
    return (
        entries,
        (name, at["x"], running.tokens * views.x.shape[1] * 4),
        (name, at["weights"], pairs * 4),
        (name, at["pair_token"], pairs * 4),
        (name, at["pair_start"], (len(running.sweep.experts) + 1) * 4),
    )


def _nothing() -> None:
    """No checkpoint."""
