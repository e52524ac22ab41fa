"""The driver's hands: carries a layer's plan to the devices and waits once for the result."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Fabric
from fomoe.actors.layout import StepArena
from fomoe.actors.messages import (
    DONE,
    STEP,
    STEP_FIRST,
    STEP_ID,
    STEP_LAST,
    Priority,
    ReadFailed,
    Tag,
)
from fomoe.actors.reads import SEND_BOUND_S, Reads
from fomoe.actors.step import DeviceLink, Links, Step
from fomoe.actors.sweep_driver import PromptSweeps
from fomoe.engine.ahead import Governor
from fomoe.engine.decisions import Decider
from fomoe.engine.meter import HostCounters
from fomoe.engine.waves import BACKGROUND, GUESSED, Priorities, WaveLayout, WavePlanner
from fomoe.errors import PeerStalledError, StorageError
from fomoe.model.buffers import F32
from fomoe.residency import LogicalCache, Residency, Topology
from fomoe.routing import Route, expect_of_chunk, route_exact

SPIN_US = 300.0  # while a token is in flight; the waiter yields, so a shared core is no cliff
WAIT_MS = 20.0
LONG_LAYER_S = 200e-6  # from a device's answer to the next step
STEP_BOUND_S = 120.0


class TieredExperts:
    """Expert host over three tiers and any number of devices; see `ExpertHost`."""

    def __init__(self, fabric: Fabric, links: Links, topology: Topology, residency: Residency,
                 expert_bytes: list[int], arena: StepArena, governor: Governor,
                 ) -> None:  # fmt: skip
        self.counters = HostCounters()
        self.residency = residency
        self.fabric = fabric
        self.governor = governor
        self._guesses = [0] * topology.n_layers  # asked for, until the layer's step
        self._top_k = arena.top_k
        self._home: list[DeviceLink] = [links.devices[d] for d in topology.layer_device]
        layout = WaveLayout(
            layer_node=np.array([device.node for device in self._home], np.int32),
            layer_device=topology.layer_device,
            expert_bytes=np.array(expert_bytes, np.int64),
        )
        self.expert_bytes = layout.expert_bytes
        self._planner = WavePlanner(
            residency, [node.slots for node in links.nodes], layout,
            Priorities(int(Priority.DEMAND), int(Priority.PREFETCH), int(Priority.BACKGROUND)),
            governor.arrays,
            max_tokens=arena.max_tokens, top_k=arena.top_k,
        )  # fmt: skip
        self._buffer = bytearray(fabric.spec.slot_bytes)
        self._steps = {
            device.name: [Step(device, buffer) for buffer in device.buffers]
            for device in links.devices
        }
        self._step = self._steps[links.devices[0].name][0]
        self._step_id = 0
        # A step that goes out when the driver has nothing more to compute meanwhile; its reads are
        # under way already.
        self._held: bytes | None = None
        self._answered = 0.0  # when a device last did
        self._asked = 0.0  # when the step's reads were sent
        self._window_s = 0.0  # from the answer before to then
        self.reads = Reads(fabric, links.nodes, self._planner, governor, self.counters)
        self.sweeps = PromptSweeps(self, arena.top_k)

    def decide(
        self, layer: int, h: F32, scores: F32, logical: LogicalCache, *, decoding: bool
    ) -> None:
        """Route one sequence's tokens exactly and begin the layer with them."""
        if not decoding:
            route = route_exact(scores, self._top_k)
            logical.observe(layer, route.ids)
            self.begin(layer, h, route, decoding=False)
            return
        step = self._open(layer, h, decoding)
        self._send_wave(step, self._planner.decide(layer, scores, logical, step.buffer.arrays))

    def decide_by(
        self, layer: int, h: F32, scores: F32, decider: Decider, prices: F32 | None
    ) -> None:
        """Let a rule choose for one sequence's decode step and begin the layer with that."""
        step = self._open(layer, h, decoding=True)
        arrays = step.buffer.arrays
        self._send_wave(step, self._planner.decide_by(layer, scores, decider, prices, arrays))

    def read_later(self, layer: int, experts: npt.NDArray[np.int32]) -> None:
        """Load what a rule left out, behind all demand; never waits."""
        reads = self._planner.read_later(layer, experts)
        self._planner.charge(self.counters, decoding=True)
        self.reads.send(layer, reads)

    def begin(self, layer: int, h: F32, route: Route, *, decoding: bool) -> None:
        """Plan the layer, send demand reads out first, start what is resident."""
        if not decoding:
            self._forget_step()
            self.sweeps.begin(layer, h, route)
            return
        step = self._open(layer, h, decoding)
        self._send_wave(step, self._planner.place(layer, route, step.buffer.arrays))

    @property
    def guess_depth(self) -> int:
        """For how many of the next layers a decode step is to call `look_ahead` now."""
        return self.governor.depth

    def look_ahead(self, layer: int, scores: F32, depth: int = 1) -> None:
        """Load what `layer`, `depth` further on, will want, behind all demand; never waits."""
        if self.sweeps.takes_guesses:
            if np.isfinite(scores).all():  # a guess fails nothing
                self.sweeps.look_ahead(layer, expect_of_chunk(scores, self._top_k))
            return
        reads = self._planner.look_ahead(layer, scores, depth)
        if reads:
            self._guesses[layer] += reads
            self.reads.send(layer, reads)
            before = self.counters.nvme_bytes
            self._planner.charge(self.counters, decoding=True)
            self.counters.prefetch_bytes += self.counters.nvme_bytes - before

    def open_prompt(self, tokens: int) -> None:
        """Begin a chunk of a prompt: `look_ahead` may be called for its first layers."""
        self.sweeps.open(tokens)

    def may_guess(self, layer: int) -> bool:
        """Whether an expert of the layer lies in no tier, and there are slots to read it into."""
        return self.sweeps.may_guess(layer) and not self.residency.mask(layer).all()

    def follow(self, logical: LogicalCache | None) -> None:
        """Keep at hand what this cache takes as resident, as it changes; None: nothing."""
        self.residency.follow(None if logical is None else logical.caches.resident[0])

    def finish(self) -> F32:
        """Wait for the step begun last and return the routed sum float32 [T, D]."""
        if self.sweeps.active:
            return self.sweeps.finish()
        step, planner = self._step, self._planner
        if self._held is not None:
            held, self._held = self._held, None
            self._send_step(step, held)
        while True:
            self._await_done(step)
            self.residency.release(step.layer)
            if planner.end == planner.n_experts:
                step.under_way = False
                if step.layer:  # nobody can guess for the first
                    took_s = self._answered - self._asked
                    self.governor.step(
                        self._window_s, took_s, step.waited_s, step.reads, step.guessed
                    )
                return step.buffer.rows(step.tokens)[1]
            self._send_wave(step, planner.wave())

    def next_step(self) -> int:
        """See `SweepHost`."""
        self._step_id += 1
        return self._step_id

    def device_of(self, layer: int) -> DeviceLink:
        """See `SweepHost`."""
        return self._home[layer]

    def _forget_step(self) -> None:
        """Unpin what a pass left behind that failed between `begin` and `finish`."""
        if self._step.under_way:
            self.residency.release(self._step.layer)
            self._step.under_way = False
            self._held = None

    def _open(self, layer: int, h: F32, decoding: bool) -> Step:
        self.sweeps.abandon()  # a pass that failed between begin and finish
        self.reads.settle()  # an expert whose read failed must be read again
        self._forget_step()
        self._step_id += 1
        if layer == 0:
            self.governor.token()
        step = self._steps[self._home[layer].name][self._step_id % StepArena.BUFFERS]
        step.id, step.layer, step.tokens, step.decoding = self._step_id, layer, len(h), decoding
        step.under_way, step.waited_s = True, 0.0
        np.copyto(step.buffer.rows(step.tokens)[0], h)
        self._step = step
        return step

    def _send_wave(self, step: Step, reads: int) -> None:
        planner, device = self._planner, step.device
        if reads:
            self.reads.send(step.layer, reads)
        planner.charge(self.counters, decoding=step.decoding)
        if planner.first == 0:
            self._note_reads(step, reads)
        first, end, count = planner.first, planner.end, planner.n_experts
        flags = (STEP_FIRST if first == 0 else 0) | (STEP_LAST if end == count else 0)
        payload = STEP.pack(step.id, step.layer, step.tokens, self._top_k, first, end - first,
                            flags, step.buffer.number)  # fmt: skip
        if device.shares_cores and first == 0 and self._is_long():
            self._held = payload
            self.fabric.ring(device.name)  # it is awake by the time that its step goes out
            return
        self._send_step(step, payload)

    def _note_reads(self, step: Step, reads: int) -> None:
        """Time the step's reads from now on; drop the guesses for it that it does not want."""
        self._asked = time.monotonic()
        self._window_s = self._asked - self._answered
        step.guessed = int(self._planner.arrays.counts[GUESSED])
        step.reads = reads - step.guessed - int(self._planner.arrays.counts[BACKGROUND])
        in_vain = self._guesses[step.layer] - step.guessed
        self._guesses[step.layer] = 0
        if in_vain > 0:
            self.reads.drop_guesses(step.layer)

    def _is_long(self) -> bool:
        """Whether layers are so long that driver and device would lose turns to each other.

        Two processes with as many threads as cores do, where a layer's products are worth more
        than one thread. Short ones leave a core to each.
        """
        return time.monotonic() - self._answered > LONG_LAYER_S

    def _send_step(self, step: Step, payload: bytes) -> None:
        planner = self._planner
        regions = step.buffer.regions(step.tokens, planner.n_experts, planner.first, planner.end)
        step.device.sender.send(Tag.STEP, payload, regions, SEND_BOUND_S)

    def _await_done(self, step: Step) -> None:
        """Wait for the device: the only place in the loop that can."""
        deadline = time.monotonic() + STEP_BOUND_S
        failure: ReadFailed | None = None
        while True:
            bell = self.fabric.bell()
            message = step.device.receiver.try_recv(self._buffer)
            if message is not None:
                step_id, aborted, _, computed_ns, waited_ns = DONE.unpack_from(self._buffer)
                if step_id != step.id:
                    continue
                self._answered = time.monotonic()
                self.counters.compute_s += computed_ns / 1e9
                self.counters.stall_s += waited_ns / 1e9
                step.waited_s += waited_ns / 1e9
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
        failed = self.reads.failures(
            step.layer, self._planner.arrays.experts[: self._planner.n_experts]
        )
        if not failed:
            return None
        step.device.sender.send(Tag.ABORT, STEP_ID.pack(step.id), (), SEND_BOUND_S)
        return failed[-1]
