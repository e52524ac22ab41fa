"""Loads experts onto devices through a few slots of shared memory: file, segment slot, device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fomoe.actors.channel import Fabric, Receiver, Sender
from fomoe.actors.layer_host import LayerLink
from fomoe.actors.messages import COPY, COUNT, Priority, ReadFailed, Tag, decode
from fomoe.engine.transfers import READ
from fomoe.errors import DeviceError, PeerStalledError, StorageError
from fomoe.residency import Placement

_SEND_BOUND_S = 5.0
_STALL_S = 60.0
_WAIT_MS = 100
_BATCH = 128  # records of a message


@dataclass(slots=True)
class StagingNode:
    """A node's storage and its segment, whose slots are all alike."""

    name: str
    sender: Sender
    receiver: Receiver
    free: list[int]
    generation: list[int]
    pending: deque[Placement] = field(default_factory=deque)

    @classmethod
    def of(cls, fabric: Fabric, name: str, n_slots: int) -> StagingNode:
        """Return a node whose slots are all free."""
        return cls(
            name, fabric.sender(name), fabric.receiver(name), list(range(n_slots)), [0] * n_slots
        )


class ExpertLoader:
    """Keeps every slot of the segments busy until all experts are on their devices."""

    def __init__(
        self, fabric: Fabric, nodes: list[StagingNode], devices: list[LayerLink],
        layer_device: list[int], slot_bytes: int,
    ) -> None:  # fmt: skip
        self._fabric = fabric
        self._nodes = nodes
        self._devices = devices
        self._device_of = [devices[d] for d in layer_device]
        self._slot_bytes = slot_bytes
        # Segment slots of the copies that each device has been asked for, in order.
        self._asked: dict[int, deque[int]] = {d.number: deque() for d in devices}
        self._buffer = bytearray(fabric.spec.slot_bytes)

    def run(self, placements: list[Placement], on_progress: Callable[[float], None]) -> None:
        """Load experts into the device slots of their placements.

        Raises:
            StorageError: an expert could not be read.
            DeviceError: a device failed.
            PeerStalledError: nothing has come for a minute.
        """
        for place in placements:
            self._nodes[self._device_of[place.key.layer].node].pending.append(place)
        done, moved = 0, time.monotonic()
        while done < len(placements):
            bell = self._fabric.bell()
            for node in self._nodes:
                self._ask(node)
                self._check(node)
            new = sum(self._collect(device) for device in self._devices)
            if new:
                done, moved = done + new, time.monotonic()
                on_progress(done / len(placements))
            elif time.monotonic() - moved > _STALL_S:
                raise PeerStalledError(self._nodes[0].name, _STALL_S)
            else:
                self._fabric.wait(bell, 0, _WAIT_MS)

    def _ask(self, node: StagingNode) -> None:
        """Ask for as many reads as there are free slots, and for their copies."""
        reads: list[tuple[int, ...]] = []
        copies: dict[int, list[tuple[int, ...]]] = {}
        while node.pending and node.free and len(reads) < _BATCH:
            place, slot = node.pending.popleft(), node.free.pop()
            node.generation[slot] += 1
            generation, layer, expert = node.generation[slot], place.key.layer, place.key.expert
            address, device = slot * self._slot_bytes, self._device_of[layer].number
            reads.append(
                (address, generation, slot, layer, expert, int(Priority.DEMAND), device, 0)
            )
            copies.setdefault(device, []).append(
                (address, generation, slot, layer, expert, place.slot)
            )
            self._asked[device].append(slot)
        if reads:
            node.sender.send(Tag.FETCH, np.array(reads, READ).view(np.uint8), (), _SEND_BOUND_S)
        for device, records in copies.items():
            payload = np.array(records, COPY).view(np.uint8)
            self._devices[device].sender.send(Tag.COPY, payload, (), _SEND_BOUND_S)

    def _check(self, node: StagingNode) -> None:
        while (message := node.receiver.try_recv(self._buffer)) is not None:
            tag, nbytes = message
            if tag == Tag.FAILED:
                report = decode(memoryview(self._buffer)[:nbytes])
                assert isinstance(report, ReadFailed)
                raise StorageError(report.message)

    def _collect(self, device: LayerLink) -> int:
        """Take back the slots of copies that have ended; returns how many."""
        count = 0
        while (message := device.receiver.try_recv(self._buffer)) is not None:
            tag, nbytes = message
            if tag == Tag.FAULT:
                text = self._buffer[:nbytes].decode(errors="replace")
                raise DeviceError(f"{device.name}: {text}")
            if tag == Tag.COPIED:
                count += COUNT.unpack_from(self._buffer)[0]
        for _ in range(count):
            self._nodes[device.node].free.append(self._asked[device.number].popleft())
        return count
