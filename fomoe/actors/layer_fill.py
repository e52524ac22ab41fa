"""Loads experts into VRAM and RAM before anybody waits for a token: file, segment, device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from fomoe.actors.channel import Fabric
from fomoe.actors.layer_link import LayerLink
from fomoe.actors.layer_traffic import LayerTraffic
from fomoe.actors.messages import Priority, Tag
from fomoe.actors.names import storage_name
from fomoe.engine.placed import Placed
from fomoe.errors import DeviceError, PeerStalledError
from fomoe.residency import Placement
from fomoe.types import Tier

_STALL_S = 60.0
_WAIT_MS = 100
_WINDOW = 256  # placements that are looked at together


class ExpertLoader:
    """Keeps storage and links busy until every placement's bytes lie where they belong."""

    def __init__(
        self, fabric: Fabric, links: list[LayerLink], placed: Placed, traffic: LayerTraffic
    ) -> None:
        self._fabric = fabric
        self._links = links
        self._placed = placed
        self._traffic = traffic
        self._buffer = bytearray(fabric.spec.slot_bytes)
        self._asked = self._landed = self._loads = self._ended = 0

    def run(self, placements: list[Placement], on_progress: Callable[[float], None]) -> None:
        """Load experts into the slots of their placements, those of the RAM tier first.

        Raises:
            StorageError: an expert could not be read.
            DeviceError: a device failed.
            PeerStalledError: nothing has come for a minute.
        """
        node_of = self._placed.planner.arrays.layer_node.tolist()
        rest = [
            deque(
                sorted(
                    (p for p in placements if node_of[p.key.layer] == node),
                    key=lambda place: place.tier != Tier.RAM,
                )
            )
            for node in range(len(self._placed.segments))
        ]
        total = max(1, sum(1 + (place.tier == Tier.DEVICE) for place in placements))
        moved = time.monotonic()
        while any(rest) or self._landed < self._asked or self._ended < self._loads:
            bell = self._fabric.bell()
            for node, places in enumerate(rest):
                self._bring(node, places)
            before = self._landed + self._ended
            self._landed += self._traffic.reads.preloaded()
            for link in self._links:
                self._collect(link)
            if self._landed + self._ended > before:
                moved = time.monotonic()
                on_progress((self._landed + self._ended) / total)
            elif time.monotonic() - moved > _STALL_S:
                raise PeerStalledError(storage_name(0), _STALL_S)
            else:
                self._fabric.wait(bell, 0, _WAIT_MS)
        for segment in self._placed.segments:
            segment.all_landed()

    def _bring(self, node: int, rest: deque[Placement]) -> None:
        """Ask for as many as there are slots for them to pass through."""
        placed = self._placed
        while rest:
            window = [rest.popleft() for _ in range(min(_WINDOW, len(rest)))]
            reads, copies, left = placed.segments[node].bring(window, placed.residency, ahead=True)
            rest.extendleft(reversed(left))
            self._traffic.reads.ask_ahead(node, reads, Priority.PRELOAD)
            devices = placed.topology.layer_device[copies["layer"]]
            for link in self._links:
                self._traffic.send(link, copies[devices == link.number])
            self._asked += len(reads)
            self._loads += len(copies)
            if left:
                return

    def _collect(self, link: LayerLink) -> None:
        while (message := link.receiver.try_recv(self._buffer)) is not None:
            tag, nbytes = message
            if tag == Tag.FAULT:
                text = self._buffer[:nbytes].decode(errors="replace")
                raise DeviceError(f"{link.name}: {text}")
            if tag == Tag.COPIED:
                self._ended += self._traffic.ended(self._buffer, nbytes)
