"""GPU actor: one device, the kernels on it, the experts that lie in its slots."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Regions
from fomoe.actors.expert_parts import segment_parts
from fomoe.actors.layout import StepArena, StepViews
from fomoe.actors.messages import DONE, STEP, STEP_FIRST, STEP_ID, STEP_LAST, Tag
from fomoe.actors.process import FabricMember, LoopThread
from fomoe.actors.storage import landed_bytes
from fomoe.actors.sweep_device import DeviceSweep, DriverLink, SlotMap
from fomoe.engine._engine import landed, part_addresses
from fomoe.gguf.extents import ExpertTable
from fomoe.kernels.device import Device, ExpertShape, open_device
from fomoe.storage.segment import Segment, SegmentHandle

_SPIN_US = 200.0  # while a token is in flight
_WAIT_MS = 20.0
_SEND_BOUND_S = 5.0


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What a device actor computes: shapes of the model, where experts lie, how many tokens."""

    device: str
    arena: str
    table: dict[str, Any]
    n_slots: int
    n_layers: int
    n_experts: int
    top_k: int
    hidden: int
    width: int
    max_tokens: int
    threads: int
    int8: bool


@dataclass(slots=True)
class _Step:
    """The step under way: its views and how far it has come."""

    views: StepViews
    id: int
    layer: int
    tokens: int
    top_k: int
    first: int
    count: int
    computed: int = 0
    compute_ns: int = 0
    wait_ns: int = 0


class _WholeToken:
    """The arrays of a step of one token with all its experts, cut once per buffer."""

    def __init__(self, plan: DevicePlan, views: StepViews, pairs: npt.NDArray[np.float32]) -> None:
        k = plan.top_k
        self.entries = views.entries[:k]
        self.ready = np.zeros(k, np.uint8)
        self.addresses = np.zeros((3, k), np.uint64)
        self.x, self.out = views.x[:1], views.out[:1]
        self.pair_start, self.pair_token = views.pair_start[: k + 1], views.pair_token[:k]
        self.pairs, self.order, self.weights = pairs[:k], views.order[:1], views.weights[:1]
        self.regions = ((plan.arena, views.offsets["out"], self.out.nbytes),)


class GPUActor(FabricMember):
    """Computes a layer's routed experts as their bytes land and adds them up in id order."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._loop: LoopThread | None = None
        self._next: tuple[int, int] | None = None  # a step that came while one was under way
        self._segment: Segment | None = None
        self._steps = 0
        self._experts = 0
        self._stall_ns = 0
        self._compute_ns = 0

    def open(self, plan: DevicePlan, segment: SegmentHandle) -> None:
        """Take the device and map the storage actor's segment."""
        self._plan = plan
        self._device: Device = open_device(plan.device, threads=plan.threads, int8=plan.int8)
        self._segment = Segment.attach(segment)
        self._landed = self._segment.view[: plan.n_slots * 8].view(np.uint64)
        self._slots_at = self._segment.address + landed_bytes(plan.n_slots)
        table = ExpertTable.from_dict(plan.table)
        layers = range(plan.n_layers)
        self._parts = segment_parts(table, self._slots_at)
        self._shapes = [ExpertShape.of(table, i, plan.hidden, plan.width) for i in layers]
        pairs = plan.max_tokens * plan.top_k
        self._pairs = np.zeros((pairs, plan.hidden), np.float32)
        most = min(pairs, plan.n_experts)
        self._addresses = np.zeros(3 * most, np.uint64)
        self._ready = np.zeros(most, np.uint8)
        self._done = np.zeros(most, np.uint8)

    def start(self) -> None:
        """Begin to serve steps."""
        plan, fabric = self._plan, self.fabric
        self._from_driver = fabric.receiver("driver")
        self._to_driver = fabric.sender("driver")
        self._buffer = bytearray(fabric.spec.slot_bytes)
        layout = StepArena(plan.max_tokens, plan.hidden, plan.top_k, plan.n_experts)
        self._views = layout.views(fabric.arena(plan.arena))
        self._tokens = [_WholeToken(plan, views, self._pairs) for views in self._views]
        self._loop = loop = LoopThread(self, self.poll, self.status, _SPIN_US)
        self._sweep = DeviceSweep(
            self._device, fabric,
            DriverLink(self._from_driver, self._to_driver, plan.arena, self._views),
            SlotMap(self._landed, self._parts, self._shapes),
            lambda: loop.stopping,
        )  # fmt: skip
        self._loop.start()

    def poll(self) -> bool:
        """Serve one step if there is one."""
        message = self._next or self._from_driver.try_recv(self._buffer)
        self._next = None
        if message is None:
            return False
        if message[0] == Tag.STEP:
            self._serve(STEP.unpack_from(self._buffer))
        elif message[0] == Tag.SWEEP:
            self._next = self._sweep.serve(self._buffer)
        return True

    def _serve(self, fields: tuple[int, ...]) -> None:
        step_id, layer, tokens, top_k, first, count, flags, buffer = fields
        if tokens == 1 and count == top_k and self._serve_token(step_id, layer, buffer):
            return
        step = _Step(self._views[buffer], step_id, layer, tokens, top_k, first, count)
        if flags & STEP_FIRST:
            self._done[:] = 0
        complete = self._compute(step)
        regions: Regions = ()
        if complete and flags & STEP_LAST:
            views = step.views
            started = time.perf_counter_ns()
            out = views.out[:tokens]
            self._device.reduce(
                self._pairs[: tokens * top_k], views.order[:tokens], views.weights[:tokens], out
            )
            step.compute_ns += time.perf_counter_ns() - started
            regions = ((self._plan.arena, views.offsets["out"], out.nbytes),)
        self._stall_ns += step.wait_ns
        payload = DONE.pack(step_id, not complete, step.computed, step.compute_ns, step.wait_ns)
        self._answer(payload, regions, step.computed, step.compute_ns)

    def _serve_token(self, step_id: int, layer: int, buffer: int) -> bool:
        """Serve a step of one token if all its experts are there; the most frequent case."""
        whole, device = self._tokens[buffer], self._device
        started = time.perf_counter_ns()
        if landed(self._landed, whole.entries, whole.ready) < len(whole.ready):
            return False
        part_addresses(self._parts[layer], whole.entries, whole.addresses)
        device.experts(self._shapes[layer], whole.addresses, whole.x, whole.pair_start,
                       whole.pair_token, whole.pairs)  # fmt: skip
        device.reduce(whole.pairs, whole.order, whole.weights, whole.out)
        computed = time.perf_counter_ns() - started
        payload = DONE.pack(step_id, 0, len(whole.ready), computed, 0)
        self._answer(payload, whole.regions, len(whole.ready), computed)
        return True

    def _answer(self, payload: bytes, regions: Regions, experts: int, compute_ns: int) -> None:
        self._to_driver.send(Tag.DONE, payload, regions, _SEND_BOUND_S)
        self._steps += 1
        self._experts += experts
        self._compute_ns += compute_ns

    def _compute(self, step: _Step) -> bool:
        """Compute each expert as it lands; False when the driver gave the step up."""
        first, end = step.first, step.first + step.count
        entries = step.views.entries[first:end]
        ready, done = self._ready[first:end], self._done[first:end]
        while True:
            bell = self.fabric.bell()
            started = time.perf_counter_ns()
            if landed(self._landed, entries, ready) == step.count and not step.computed:
                runs = [(0, step.count)]  # by far the most frequent case
            else:
                runs = _runs(ready > done)
            for a, b in runs:
                self._compute_run(step, first + a, first + b)
                done[a:b] = 1
                step.computed += b - a
            computed = time.perf_counter_ns()
            step.compute_ns += computed - started
            if step.computed == step.count:
                return True
            if self._given_up(step.id):
                return False
            self.fabric.wait(bell, _SPIN_US, _WAIT_MS)
            step.wait_ns += time.perf_counter_ns() - computed

    def _compute_run(self, step: _Step, a: int, b: int) -> None:
        """Compute entries a..b, whose pairs lie one behind the other."""
        views = step.views
        addresses = self._addresses[: 3 * (b - a)].reshape(3, b - a)
        part_addresses(self._parts[step.layer], views.entries[a:b], addresses)
        pair_start = views.pair_start[a : b + 1]
        first, end = int(pair_start[0]), int(pair_start[-1])
        self._device.experts(
            self._shapes[step.layer], addresses, views.x[: step.tokens],
            pair_start - first if first else pair_start, views.pair_token[first:end],
            self._pairs[first:end],
        )  # fmt: skip

    def _given_up(self, step_id: int) -> bool:
        """Whether the driver gave this step up or went on to another, or the process is to end."""
        assert self._loop is not None
        if self._loop.stopping:
            return True
        message = self._from_driver.try_recv(self._buffer)
        if message is not None and message[0] in (Tag.STEP, Tag.SWEEP):
            self._next = message  # the driver went on: it waits for the new step alone
            return True
        return (
            message is not None
            and message[0] == Tag.ABORT
            and STEP_ID.unpack_from(self._buffer)[0] == step_id
        )

    def status(self) -> str:
        """Return one line for the log."""
        return (
            f"{self._device.name}  {self._steps:,} steps  {self._experts:,} experts  "
            f"computing {self._compute_ns / 1e9:.1f} s  waiting {self._stall_ns / 1e9:.1f} s"
        )

    def stats(self) -> dict[str, float]:
        """Return counters of this device."""
        return {
            "steps": self._steps,
            "experts": self._experts + self._sweep.experts,
            "compute_s": (self._compute_ns + self._sweep.compute_ns) / 1e9,
            "stall_s": (self._stall_ns + self._sweep.wait_ns) / 1e9,
        }

    def stop(self) -> None:
        """End the loop."""
        if self._loop is not None:
            self._loop.stop()

    def leave(self) -> None:
        """Leave the fabric and the segment."""
        super().leave()
        if self._segment is not None:
            self._segment.close()


def _runs(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> list[tuple[int, int]]:
    """Return [start, stop) of each stretch of True."""
    if mask.all():
        return [(0, len(mask))] if len(mask) else []
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
