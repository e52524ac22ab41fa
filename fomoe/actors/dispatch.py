"""The driver's hands: carries a layer's plan to storage and device, waits once for the result."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Fabric
from fomoe.actors.layout import StepArena
from fomoe.actors.messages import (
    DONE,
    FETCH,
    STEP,
    STEP_FIRST,
    STEP_ID,
    STEP_LAST,
    Priority,
    ReadFailed,
    Tag,
    decode,
)
from fomoe.actors.step import (
    DeviceLink,
    NodeLink,
    Step,
    regions,
    substituted_pairs,
    write_route,
)
from fomoe.actors.sweep_driver import PromptSweeps
from fomoe.engine.meter import HostCounters
from fomoe.engine.transfers import Read
from fomoe.errors import PeerStalledError, StorageError
from fomoe.model.buffers import F32, Rows
from fomoe.residency import Placement, Plan, Residency, Topology
from fomoe.routing import Route, expect_of_chunk, group_by_expert, predict_experts
from fomoe.types import ExpertKey, Tier

SPIN_US = 300.0  # while a token is in flight; the waiter yields, so a shared core is no cliff
WAIT_MS = 20.0
STEP_BOUND_S = 120.0
SEND_BOUND_S = 5.0
FETCH_BATCH = 256  # records a message: half of the smallest ring slot


class TieredExperts:
    """Expert host over three tiers and any number of devices; see `ExpertHost`."""

    def __init__(self, fabric: Fabric, devices: list[DeviceLink], nodes: list[NodeLink],
                 topology: Topology, residency: Residency, expert_bytes: list[int],
                 top_k: int) -> None:  # fmt: skip
        self.counters = HostCounters()
        self.residency = residency
        self.fabric = fabric
        self._devices = devices
        self._nodes = nodes
        self._top_k = top_k
        self._home = [int(d) for d in topology.layer_device]
        self._expert_bytes = expert_bytes
        self._buffer = bytearray(fabric.spec.slot_bytes)
        shape = (topology.n_layers, topology.n_experts)
        # Prefetched and not used yet: counted as reads when used, and asked for again as demand,
        # since storage may have dropped a prefetch that never got its turn.
        self.unproven = np.full(shape, Tier.DEVICE, np.int8)
        self._step_id = 0
        self._step: Step | None = None
        self.sweeps = PromptSweeps(self, top_k)

    def begin(self, layer: int, h: Rows, route: Route, *, decoding: bool) -> None:
        """Plan the layer, send demand reads out first, start what is resident."""
        if not decoding:
            self._forget_step()
            self.sweeps.begin(layer, h, route)
            return
        self.sweeps.abandon()  # a pass that failed between begin and finish
        for node in self._nodes:
            self._storage_messages(node, [])  # an expert whose read failed must be read again
        self._forget_step()
        groups = group_by_expert(route.ids)
        tiers = self.residency.tier_of(layer)[groups.experts]
        by_tier = np.argsort(tiers, kind="stable")
        device = self._devices[self._home[layer]]
        self._step_id += 1
        buffer = self._step_id % StepArena.BUFFERS
        views = device.views[buffer]
        counts = np.diff(groups.pair_start)[by_tier]
        tokens = len(route.ids)
        write_route(views, groups, by_tier, counts, groups.arrange(route.weights))
        np.copyto(views.x[:tokens], h.x)
        self._step = Step(
            layer, tokens, self._step_id, device, views, buffer, groups.experts[by_tier],
            counts - substituted_pairs(route, groups)[by_tier],
            max(self.residency.quota(layer), self._top_k), 0, decoding,
        )  # fmt: skip
        self._send_wave(self._step)

    def _forget_step(self) -> None:
        """Unpin what a pass left behind that failed between `begin` and `finish`."""
        if self._step is not None:
            self.residency.release(self._step.layer)
            self._step = None

    def look_ahead(self, layer: int, scores: F32) -> None:
        """Load what `layer` will probably want, behind all demand reads; never waits."""
        if not np.isfinite(scores).all():
            return  # between `begin` and `finish` nothing may fail, least of all a guess
        if self.sweeps.active:
            self.sweeps.look_ahead(layer, expect_of_chunk(scores, self._top_k))
            return
        expected = predict_experts(scores, self._top_k)
        # Eager: a guess by the next layer's own router is worth more than the past of a victim.
        plan = self.residency.prefetch(layer, expected, self._top_k, eager=True)
        if plan.fetches:
            self._fetch(plan, Priority.PREFETCH)
            for fetch in plan.fetches:
                self.unproven[layer, fetch.expert] = fetch.source
            self.counters.prefetch_issued += len(plan.fetches)

    def may_guess(self, layer: int) -> bool:
        """Whether an expert of the layer lies in no tier."""
        return not self.residency.mask(layer).all()

    def finish(self) -> F32:
        """Wait for the step begun last and return the routed sum float32 [T, D]."""
        if self.sweeps.active:
            return self.sweeps.finish()
        step = self._step
        assert step is not None
        while True:
            self._await_done(step)
            self.residency.release(step.layer)
            if step.sent == len(step.experts):
                self._step = None
                return step.views.out[: step.tokens]
            self._send_wave(step)

    def preload(self, placements: list[Placement]) -> int:
        """Ask for the reads of an initial fill; returns how many storage will announce."""
        for number, node in enumerate(self._nodes):
            mine = [p for p in placements if self._node_of(p.key.layer) == number]
            self._send_reads(number, node.slots.fill(mine), Priority.PRELOAD)
        return len(placements)

    def preloaded(self) -> int:
        """Return how many preload reads have landed since the last call."""
        return sum(self._storage_messages(node) for node in self._nodes)

    def next_step(self) -> int:
        """See `SweepHost`."""
        self._step_id += 1
        return self._step_id

    def device_of(self, layer: int) -> DeviceLink:
        """See `SweepHost`."""
        return self._devices[self._home[layer]]

    def node_of(self, layer: int) -> NodeLink:
        """See `SweepHost`."""
        return self._nodes[self._node_of(layer)]

    def ask(self, layer: int, reads: list[Read], priority: Priority) -> None:
        """See `SweepHost`."""
        self._send_reads(self._node_of(layer), reads, priority)
        self.counters.nvme_bytes += len(reads) * self._expert_bytes[layer]

    def failures(self, layer: int, experts: npt.NDArray[np.int32]) -> list[ReadFailed]:
        """See `SweepHost`."""
        found: list[ReadFailed] = []
        for node in self._nodes:
            self._storage_messages(node, found, (layer, experts))
        return [m for m in found if m.layer == layer and m.expert in experts]

    def _send_wave(self, step: Step) -> None:
        first = step.sent
        room = min(step.wave, self.residency.capacity(step.layer))
        end = min(first + room, len(step.experts))
        experts = step.experts[first:end]
        plan = self.residency.plan(step.layer, np.sort(experts))
        for fetch in plan.fetches:
            if fetch.source == Tier.NVME:  # a prefetch of it, if any, was evicted unused
                self.unproven[step.layer, fetch.expert] = Tier.DEVICE
        self._count(step, plan, experts, step.pairs[first:end])
        self._fetch(plan, Priority.DEMAND)
        self.prove(step.layer, experts)
        slots = self._nodes[step.device.node].slots
        entries = step.views.entries[first:end]
        entries["slot"], entries["address"], entries["generation"] = slots.locate(
            step.layer, experts
        )
        entries["expert"] = experts
        flags = (STEP_FIRST if first == 0 else 0) | (STEP_LAST if end == len(step.experts) else 0)
        step.sent = end
        payload = STEP.pack(step.id, step.layer, step.tokens, self._top_k, first, end - first,
                            flags, step.buffer)  # fmt: skip
        step.device.sender.send(Tag.STEP, payload, regions(step, first, end), SEND_BOUND_S)

    def _node_of(self, layer: int) -> int:
        return self._devices[self._home[layer]].node

    def _is_resident(self, key: ExpertKey) -> bool:
        return bool(self.residency.mask(key.layer)[key.expert])

    def _fetch(self, plan: Plan, priority: Priority) -> None:
        """Send the plan's reads to the layer's node."""
        number = self._node_of(plan.layer)
        reads = self._nodes[number].slots.apply(plan, self._is_resident)
        self._send_reads(number, reads, priority)
        self.counters.nvme_bytes += len(reads) * self._expert_bytes[plan.layer]
        self._charge(plan)

    def _charge(self, plan: Plan) -> None:
        """Charge link and RAM for what a card would move: promotions and victims copied back."""
        for fetch in plan.fetches:
            if fetch.source == Tier.RAM:
                self.counters.ram_bytes += self._expert_bytes[plan.layer]
            if fetch.demoted_to >= 0 and fetch.victim is not None:
                self.counters.demoted_bytes += self._expert_bytes[fetch.victim.layer]

    def _send_reads(self, node: int, reads: list[Read], priority: Priority) -> None:
        for start in range(0, len(reads), FETCH_BATCH):
            rows = [
                (r.address, r.generation, r.slot, r.expert.layer, r.expert.expert, priority,
                 self._home[r.expert.layer], 0)
                for r in reads[start : start + FETCH_BATCH]
            ]  # fmt: skip
            batch = np.array(rows, FETCH).view(np.uint8)
            self._nodes[node].sender.send(Tag.FETCH, batch, (), SEND_BOUND_S)

    def prove(self, layer: int, experts: npt.NDArray[np.int32]) -> None:
        """Ask again, as demand, for prefetched experts that are wanted now."""
        unproven = experts[self.unproven[layer, experts] != Tier.DEVICE]
        if not len(unproven):
            return
        self.unproven[layer, unproven] = Tier.DEVICE
        number = self._node_of(layer)
        columns = self._nodes[number].slots.locate(layer, unproven)
        reads = [
            Read(ExpertKey(layer, e), s, a, g)
            for e, s, a, g in zip(unproven.tolist(), *(c.tolist() for c in columns), strict=True)
        ]
        self._send_reads(number, reads, Priority.DEMAND)

    def _count(self, step: Step, plan: Plan, experts: npt.NDArray[np.int32],
               pairs: npt.NDArray[np.int64]) -> None:  # fmt: skip
        """Count the wave's activations by the tier that their bytes came from."""
        source = self.unproven[step.layer].copy()
        self.counters.prefetch_used += int(np.count_nonzero(source[experts] != Tier.DEVICE))
        for fetch in plan.fetches:
            if source[fetch.expert] != Tier.NVME:
                source[fetch.expert] = fetch.source
        by_tier = np.bincount(source[experts], weights=pairs, minlength=3).astype(np.int64)
        device, ram, nvme = (int(n) for n in by_tier)
        if step.decoding:
            self.counters.hits_device += device
            self.counters.hits_ram += ram
            self.counters.reads_nvme += nvme
        else:
            self.counters.prompt_hits_device += device
            self.counters.prompt_hits_ram += ram
            self.counters.prompt_reads_nvme += nvme

    def _await_done(self, step: Step) -> None:
        """Wait for the device: the only place in the loop that can."""
        deadline = time.monotonic() + STEP_BOUND_S
        failure: ReadFailed | None = None
        while True:
            bell = self.fabric.bell()
            message = step.device.receiver.try_recv(self._buffer)
            if message is not None:
                step_id, aborted, _, _, waited_ns = DONE.unpack_from(self._buffer)
                if step_id != step.id:
                    continue
                self.counters.stall_s += waited_ns / 1e9
                if aborted:
                    self.residency.release(step.layer)
                    raise StorageError(failure.message if failure else "a device gave up a step")
                return
            failure = self._failures(step) or failure
            if time.monotonic() > deadline:
                raise PeerStalledError(step.device.name, STEP_BOUND_S)
            self.fabric.wait(bell, SPIN_US, WAIT_MS)

    def _failures(self, step: Step) -> ReadFailed | None:
        """Take storage's messages; ends the step when one of its reads failed."""
        failed = None
        for node in self._nodes:
            found: list[ReadFailed] = []
            self._storage_messages(node, found, (step.layer, step.experts))
            for message in found:
                if message.layer == step.layer and message.expert in step.experts:
                    failed = message
        if failed is not None:
            step.device.sender.send(Tag.ABORT, STEP_ID.pack(step.id), (), SEND_BOUND_S)
        return failed

    def _storage_messages(self, node: NodeLink, failed: list[ReadFailed] | None = None,
                          step: tuple[int, npt.NDArray[np.int32]] | None = None,
                          ) -> int:  # fmt: skip
        """Take what storage sent: failures into `failed`; returns how many preloads landed.

        Not into `failed` go those of reads that nobody waits for any more, and of prefetches of
        experts that `step` (layer, experts) wants: their demand read, from `prove`, decides.
        """
        landed = 0
        while (message := node.receiver.try_recv(self._buffer)) is not None:
            tag, nbytes = message
            if tag == Tag.PRELOADED:
                landed += 1
                continue
            report = decode(memoryview(self._buffer)[:nbytes])
            assert isinstance(report, ReadFailed)
            if failed is None:
                raise StorageError(report.message)
            key = ExpertKey(report.layer, report.expert)
            wanted = step is not None and step[0] == key.layer and key.expert in step[1]
            if (report.prefetch and wanted) or not node.slots.is_current(key, report.generation):
                continue
            self.residency.forget(key.layer, np.array([key.expert], np.int32))
            node.slots.forget(key)
            self.unproven[key.layer, key.expert] = Tier.DEVICE
            failed.append(report)
        return landed
