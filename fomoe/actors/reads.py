"""The driver's talk with storage: the reads that it asks for, and those that never land."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Fabric
from fomoe.actors.messages import COUNT, DROPPED, Priority, ReadFailed, Tag, decode
from fomoe.actors.step import NodeLink
from fomoe.engine.ahead import Governor
from fomoe.engine.meter import HostCounters
from fomoe.engine.transfers import READ, Read
from fomoe.engine.waves import WavePlanner
from fomoe.errors import StorageError
from fomoe.residency import Placement
from fomoe.types import ExpertKey, Tier

SEND_BOUND_S = 5.0
FETCH_BATCH = 256  # records a message: half of the smallest ring slot


class Reads:
    """Asks the nodes' storage for what a wave planner decided, and takes their reports.

    Nothing here waits for a read: devices see it land. What failed or was dropped leaves the
    planner's tables, so that it is read again when it is wanted.

    Attributes:
        unproven: int8 [L, E], see `WaveArrays`.
        background: bool [L, E], see `WaveArrays`.
    """

    def __init__(
        self, fabric: Fabric, nodes: list[NodeLink], planner: WavePlanner, governor: Governor,
        counters: HostCounters,
    ) -> None:  # fmt: skip
        arrays = planner.arrays
        self.unproven, self.background = arrays.unproven, arrays.background
        self._nodes = nodes
        self._node_of: list[NodeLink] = [nodes[node] for node in arrays.layer_node.tolist()]
        self._bell_of: list[int] = arrays.layer_device.tolist()
        self._expert_bytes: list[int] = arrays.expert_bytes.tolist()
        self._planner = planner
        self._governor = governor
        self._counters = counters
        # The generation of each slot of a node that was asked for as demand last.
        self._demanded = {node.name: np.zeros(node.slots.n_slots, np.uint64) for node in nodes}
        self._buffer = bytearray(fabric.spec.slot_bytes)

    def node_of(self, layer: int) -> NodeLink:
        """Return the node whose segment holds the layer's experts."""
        return self._node_of[layer]

    def preload(self, placements: list[Placement]) -> int:
        """Ask for the reads of an initial fill; returns how many storage will announce."""
        for node in self._nodes:
            mine = [p for p in placements if self._node_of[p.key.layer] is node]
            self._ask(node, node.slots.fill(mine), Priority.PRELOAD)
        return len(placements)

    def ask_ahead(self, node: int, reads: list[Read], priority: Priority) -> None:
        """Send a node reads that nobody waits for; they are not counted."""
        self._ask(self._nodes[node], reads, priority)

    def preloaded(self) -> int:
        """Return how many preload reads have landed since the last call.

        Raises:
            StorageError: one has failed.
        """
        return sum(self._take(node) for node in self._nodes)

    def send(self, layer: int, count: int) -> None:
        """Send the first `count` reads that the planner's last call for the layer asks for."""
        self._send(self._node_of[layer], self._planner.arrays.reads[:count])

    def ask(self, layer: int, reads: list[Read], priority: Priority) -> None:
        """Send a prompt's reads of a layer and count their bytes."""
        self._ask(self._node_of[layer], reads, priority)
        n_bytes = len(reads) * self._expert_bytes[layer]
        self._counters.nvme_bytes += n_bytes
        self._counters.prompt_bytes += n_bytes

    def prove(self, layer: int, experts: npt.NDArray[np.int32]) -> None:
        """Ask again, as demand, for prefetched experts that are wanted now."""
        unproven = self.came_true(layer, experts)
        node = self._node_of[layer]
        columns = (column.tolist() for column in node.slots.locate(layer, unproven))
        reads = [
            Read(ExpertKey(layer, expert), slot, address, generation)
            for expert, slot, address, generation in zip(unproven.tolist(), *columns, strict=True)
        ]
        self._ask(node, reads, Priority.DEMAND)

    def came_true(self, layer: int, experts: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Note that a prompt wants these; returns those that had been prefetched and not wanted."""
        unproven: npt.NDArray[np.int32] = experts[self.unproven[layer, experts] != Tier.DEVICE]
        self.unproven[layer, unproven] = Tier.DEVICE
        self._governor.came_true(layer, unproven, self._expert_bytes[layer])
        return unproven

    def guess(self, layer: int, expert: int) -> None:
        """Note that a prompt has an expert read ahead."""
        self.unproven[layer, expert] = Tier.NVME
        self.background[layer, expert] = False
        self._governor.leave(layer, expert)

    def evict(self, layer: int, expert: int) -> None:
        """Note that an expert makes room; what a guess paid for it comes back if it is dropped."""
        self.unproven[layer, expert] = Tier.DEVICE

    def drop_guesses(self, layer: int) -> None:
        """Let storage forget the layer's prefetches that it has not begun to read."""
        self._node_of[layer].sender.send(Tag.DROP, COUNT.pack(layer), (), SEND_BOUND_S)

    def settle(self) -> None:
        """Take what storage has reported while nobody waits for a step."""
        for node in self._nodes:
            self._take(node, [])

    def failures(self, layer: int, experts: npt.NDArray[np.int32]) -> list[ReadFailed]:
        """Take storage's reports; returns failed reads of the layer's experts."""
        found: list[ReadFailed] = []
        for node in self._nodes:
            self._take(node, found, (layer, experts))
        return [m for m in found if m.layer == layer and m.expert in experts]

    def _ask(self, node: NodeLink, reads: list[Read], priority: Priority) -> None:
        rows = [
            (r.address, r.generation, r.slot, r.expert.layer, r.expert.expert, int(priority),
             self._bell_of[r.expert.layer], 0)
            for r in reads
        ]  # fmt: skip
        self._send(node, np.array(rows, READ))

    def _send(self, node: NodeLink, reads: npt.NDArray[np.void]) -> None:
        demanded = reads[reads["priority"] == Priority.DEMAND]
        self._demanded[node.name][demanded["slot"]] = demanded["generation"]
        for start in range(0, len(reads), FETCH_BATCH):
            batch = reads[start : start + FETCH_BATCH].view(np.uint8)
            node.sender.send(Tag.FETCH, batch, (), SEND_BOUND_S)

    def _take(
        self, node: NodeLink, failed: list[ReadFailed] | None = None,
        step: tuple[int, npt.NDArray[np.int32]] | None = None,
    ) -> int:  # fmt: skip
        """Take what storage sent: failures into `failed`; returns how many preloads landed.

        Not into `failed` go those of reads that nobody waits for any more, and of prefetches of
        experts that `step` (layer, experts) wants: their demand read, asked for as well, decides.
        """
        landed = 0
        while (message := node.receiver.try_recv(self._buffer)) is not None:
            tag, nbytes = message
            if tag == Tag.PRELOADED:
                landed += 1
                continue
            if tag == Tag.DROPPED:
                self._take_dropped(node, nbytes)
                continue
            report = decode(memoryview(self._buffer)[:nbytes])
            assert isinstance(report, ReadFailed)
            if failed is None:
                raise StorageError(report.message)
            key = ExpertKey(report.layer, report.expert)
            wanted = step is not None and step[0] == key.layer and key.expert in step[1]
            is_current = node.slots.is_current(key, report.slot, report.generation)
            if (report.prefetch and wanted) or not is_current:
                continue
            self._planner.forget(key)
            failed.append(report)
        return landed

    def _take_dropped(self, node: NodeLink, nbytes: int) -> None:
        """Forget prefetches that storage never read, unless they are asked for again by now."""
        counters, demanded = self._counters, self._demanded[node.name]
        for layer, expert, slot, generation in DROPPED.iter_unpack(self._buffer[:nbytes]):
            key = ExpertKey(layer, expert)
            if demanded[slot] == generation:  # which storage has read then, or will
                continue
            if node.slots.is_current(key, slot, generation):
                self._planner.forget(key)
            cost = self._expert_bytes[layer]
            counters.nvme_bytes -= cost
            if self._governor.refund(layer, expert, cost):
                counters.prefetched_dropped += 1
                counters.prefetch_bytes -= cost
            elif self.background[layer, expert]:
                counters.background_bytes -= cost
            else:
                counters.prompt_bytes -= cost
