"""The driver's hands where devices host whole layers: carries a pass through them, half by half.

A message asks for the back of a layer and, where the next layer is on the same device, for its
front: one message each way and layer. Where the next layer is elsewhere both devices are told at
once, and the second waits for the first one's residual stream, which lies in shared memory.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Fabric, Regions
from fomoe.actors.layer_link import LayerLink, OpenStep
from fomoe.actors.layer_sweeps import LayerSweeps
from fomoe.actors.layer_traffic import LayerTraffic
from fomoe.actors.messages import DONE, LAYERS, STEP_ID, Do, Tag
from fomoe.engine.copies import COPY
from fomoe.engine.decisions import Decider
from fomoe.engine.device_forward import Pass
from fomoe.engine.placed import Placed
from fomoe.errors import DeviceError, EngineError, PeerStalledError, StorageError
from fomoe.model.buffers import F32
from fomoe.residency import LogicalCache
from fomoe.routing import Route

I32 = npt.NDArray[np.int32]
Records = npt.NDArray[np.void]
Orders = tuple[Records, Records]  # of `COPY` and of `ENTRY`, with a message

_SPIN_US = 1000.0  # while a token is in flight: as long as a layer may take
_WAIT_MS = 20.0
_SEND_BOUND_S = 5.0
_STEP_BOUND_S = 120.0
_NO_COPIES = np.empty(0, COPY)
_NO_ORDERS: Orders = _NO_COPIES, _NO_COPIES


class DeviceLayers:
    """Layers on any number of devices; see `LayerHost`.

    `ahead` says that devices answer with what the next layer's router would say.
    """

    def __init__(
        self, fabric: Fabric, links: list[LayerLink], placed: Placed, traffic: LayerTraffic, *,
        n_states: int, ahead: bool,
    ) -> None:  # fmt: skip
        self.fabric = fabric
        self.links = links
        self.n_states = n_states
        self.placed = placed
        self.traffic = traffic
        self.looks_ahead = ahead and traffic.moves
        self._sweeps = LayerSweeps(self, placed, traffic)
        self._wanted = np.zeros(0, np.int32)  # experts of the step that is waited for
        self._layer = 0
        self.counters = placed.counters
        self.expert_bytes = placed.expert_bytes
        self._home: list[LayerLink] = [links[d] for d in placed.topology.layer_device]
        self._buffer = bytearray(fabric.spec.slot_bytes)
        self._step_id = 0
        self._passes = 0
        self._pass = Pass(np.zeros(1, np.int32), 0, 0, overlap=True)
        self._with_token = Do.LOGITS  # what a token's pass ends with: what the last one's was for
        self._has = 0  # of the pass's last row

    @property
    def runs_whole(self) -> bool:
        """Whether one device hosts every layer and holds every expert."""
        return len(self.links) == 1 and self.placed.on_devices

    def follow(self, logical: LogicalCache | None) -> None:
        """Keep at hand what this cache takes as resident, as it changes; None: nothing."""
        self.placed.follow(logical)

    def open(self, step: Pass) -> None:
        """Embed the tokens and begin the front of the first layer."""
        self._open(step)
        self._send(self._home[0], Do.EMBED | Do.FRONT, 0)

    def scores(self, layer: int) -> F32:
        """Wait for the layer's front; its scores float32 [T, E] stand until the next call."""
        link = self._home[layer]
        self._await(link)
        scores: F32 = link.views.scores_of(layer)[: len(self._pass.tokens)]
        return scores

    def decide(self, layer: int, scores: F32, logical: LogicalCache) -> None:
        """Route one sequence's token exactly, tell its logical cache, and begin the back."""
        self._settle(layer)
        reads = self.placed.decide(layer, scores, logical)
        self._go(layer, reads, Do.BACK | Do.CHOOSE)
        self._look_ahead(layer)

    def decide_by(self, layer: int, scores: F32, decider: Decider, prices: F32 | None) -> None:
        """Let a rule choose for one sequence's token, and begin the back."""
        self._settle(layer)
        reads = self.placed.decide_by(layer, scores, decider, prices)
        self._go(layer, reads, Do.BACK)
        self._look_ahead(layer)

    def begin(self, layer: int, route: Route, *, decoding: bool, exact: bool) -> None:
        """Begin the back with a route that was made elsewhere; `exact`: it is the router's own."""
        link, tokens = self._home[layer], len(route.ids)
        if tokens == 1:
            self._settle(layer)
            reads = self.placed.place(layer, route, decoding=decoding)
            back = Do.BACK | Do.CHOOSE if exact else Do.BACK
            self._go(layer, reads, back, decoding=decoding)
        elif self.traffic.moves:
            self._sweep(layer, route, exact=exact)
        else:
            self.placed.count_hits(route.ids.size, decoding=decoding)
            if not exact:
                link.views.ids[:tokens] = route.ids
                link.views.weights[:tokens] = route.weights
            self._carry_on(layer, Do.BACK | Do.CHOOSE if exact else Do.BACK)

    def read_later(self, layer: int, experts: I32) -> None:
        """Load experts that were wanted and did not run, behind all demand; never waits."""
        if self.traffic.moves:
            self.traffic.read_later(layer, experts)

    def _settle(self, layer: int) -> None:
        """Wait for what the layer's next step may not overtake, and hear what storage says."""
        if not self.traffic.moves:
            return
        self._close(self._home[layer])
        for link in self.links:
            if self.placed.planner.is_tight(layer):
                self._close(link)
        self.traffic.settle()

    def _go(self, layer: int, reads: int, back: int, *, decoding: bool = True) -> None:
        """Send the step that was planned last, and the back of its layer."""
        placed, link = self.placed, self._home[layer]
        planner = placed.planner
        self._layer, self._wanted = layer, planner.arrays.experts[: planner.n_experts]
        self.traffic.read(layer, reads)
        if self.looks_ahead and decoding:
            self.traffic.asked(layer, reads)
        while not placed.is_last:  # the slots that experts pass through do not hold all of them
            self._send(link, 0, layer, orders=(planner.step_copies, _NO_COPIES))
            self.traffic.bring(layer)
            link.open = OpenStep(self._step_id, layer, is_last=False)
            self._close(link)
            self.traffic.read(layer, placed.more(decoding=decoding))
        placed.picks((link.views.ids[0], link.views.weights[0]))
        if self.traffic.moves:
            self._carry_on(layer, back, planner.step_copies)
        else:
            placed.close(link.number, layer)
            self._carry_on(layer, back)

    def _look_ahead(self, layer: int) -> None:
        """Bring what the next layer will want, by what its router says of this one's stream."""
        if self.looks_ahead and self._pass.overlap and layer + 1 < len(self._home):
            scores = self._home[layer].views.ahead_of(layer)
            self.traffic.look_ahead(layer + 1, scores)

    def _sweep(self, layer: int, route: Route, *, exact: bool) -> None:
        if not exact:
            raise EngineError(f"layer {layer}: a prompt takes the router's own choice")
        for link in self.links:
            self._close(link)
        self.traffic.settle()
        self._sweeps.run(layer, route, self._home[layer])
        self._carry_on(layer, Do.COMBINE)

    def send_wave(self, layer: int, what: int, orders: Orders) -> int:
        """See `WaveHost`."""
        self._send(self._home[layer], what, layer, orders=orders)
        return self._step_id

    def hear(self, layer: int, experts: I32) -> None:
        """See `WaveHost`."""
        bell, link = self.fabric.bell(), self._home[layer]
        before = link.answered
        for each in self.links:
            self._receive(each)
        if link.answered > before:
            return
        self._check(layer, experts)
        self.fabric.wait(bell, _SPIN_US, _WAIT_MS)

    def _check(self, layer: int, experts: I32) -> None:
        """Raise StorageError where an expert of the layer could not be read, and all is at rest."""
        failed = self.traffic.failures(layer, experts)
        if failed:
            self._abort()
            raise StorageError(failed[-1].message)

    def finish(self) -> None:
        """Wait for the last layer's back."""
        self._await(self._home[-1])

    def run_whole(self, step: Pass, *, decoding: bool) -> I32:
        """Run all layers with the router's own choice; returns it, int32 [L, T, k]."""
        self._open(step)
        link, tokens = self.links[0], len(step.tokens)
        self._send(link, Do.WHOLE | self._end_of_token(), 0)
        self._await(link)
        self.placed.count_hits(link.views.chosen_of(tokens).size, decoding=decoding)
        return link.views.chosen_of(tokens)

    def logits(self, rows: npt.NDArray[np.intp]) -> F32:
        """Return the logits [n, V] of some rows of the last pass, until the next call."""
        self._with_token = Do.LOGITS
        link = self._ask_head(Do.LOGITS, rows)
        logits: F32 = link.views.logits[: len(rows)]
        return logits

    def largest(self, row: int) -> tuple[int, float]:
        """Return id and value of the greatest logit of a row of the last pass."""
        self._with_token = Do.LARGEST
        views = self._ask_head(Do.LARGEST, np.array([row])).views
        return int(views.best[0]), float(views.best_logit[0])

    def _ask_head(self, what: int, rows: npt.NDArray[np.intp]) -> LayerLink:
        """Return the device with the head once its arena has what is wanted."""
        link = self._home[-1]
        if not self._has & what:
            link.views.rows[: len(rows)] = rows
            self._send(link, what, 0, rows=len(rows))
            self._await(link)
        return link

    def _end_of_token(self) -> int:
        """Return what to ask for with a token's last layer; it spares a message."""
        if len(self._pass.tokens) > 1:
            return 0
        self._home[-1].views.rows[0] = 0
        self._has = self._with_token
        return self._has

    def copy_state(self, to: int, origin: int, length: int) -> None:
        """Make state `to` what state `origin` is after `length` tokens."""
        for link in self.links:
            payload = self._next(Do.COPY_STATE, 0, 0, (0, length, to, origin, 0, 0, 0))
            link.sent = self._step_id
            link.sender.send(Tag.LAYERS, payload, (), _SEND_BOUND_S)

    def _open(self, step: Pass) -> None:
        for link in self.links:  # a pass that failed may have left something under way
            self._close(link)
            link.given_up.clear()
        if self.looks_ahead and len(step.tokens) == 1:
            self.traffic.token()
        self._pass = step
        self._passes += 1
        self._has = 0
        first = self._home[0]
        first.views.tokens[: len(step.tokens)] = step.tokens

    def _carry_on(self, layer: int, back: int, copies: Records = _NO_COPIES) -> None:
        """Send the back of `layer`, and the front of the next as far as nobody must be asked."""
        here, overlap = self._home[layer], self._pass.overlap
        if layer + 1 == len(self._home):
            self._send_back(here, back | self._end_of_token(), layer, copies)
            return
        there = self._home[layer + 1]
        if there is here:
            if overlap:
                self._send_back(here, back | Do.FRONT, layer, copies)
                return
            self._send_back(here, back, layer, copies)
            self._await(here)
            self._send(here, Do.FRONT, layer + 1)
            return
        self._send_back(here, back | Do.GIVE, layer, copies, peer=there.number)
        word = self._step_id
        if not overlap or here.node != there.node:
            self._await(here)
        self._send(there, Do.TAKE | Do.FRONT, layer + 1, peer=here.number, awaited=word)

    def _send_back(
        self, link: LayerLink, flags: int, layer: int, copies: Records, *, peer: int = 0
    ) -> None:
        """Send the back of a layer; its slots are the device's until it has answered."""
        self._send(link, flags, layer, peer=peer, orders=(copies, _NO_COPIES))
        if self.traffic.moves and flags & Do.BACK:
            link.open = OpenStep(self._step_id, layer, is_last=True)
            self.traffic.bring(layer)

    def _send(
        self, link: LayerLink, flags: int, layer: int, *, peer: int = 0, awaited: int = 0,
        rows: int = 1, orders: Orders = _NO_ORDERS,
    ) -> None:  # fmt: skip
        step = self._pass
        if link.begun != self._passes:
            link.begun = self._passes
            flags |= Do.BEGIN
        payload = self._next(
            flags, layer, awaited,
            (len(step.tokens), step.position, step.state, peer, rows, *map(len, orders)),
        )  # fmt: skip
        link.sent = self._step_id
        for records in orders:
            if len(records):
                payload += records.tobytes()
        link.sender.send(Tag.LAYERS, payload, self._regions(link, flags, peer), _SEND_BOUND_S)

    def _next(self, flags: int, layer: int, awaited: int, rest: tuple[int, ...]) -> bytes:
        self._step_id += 1
        return LAYERS.pack(self._step_id, awaited, flags, layer, *rest)

    def _regions(self, link: LayerLink, flags: int, peer: int) -> Regions:
        """Return what a device on another box must see because of a message."""
        if link.node == 0 and (not flags & Do.TAKE or self.links[peer].node == 0):
            return ()
        tokens = len(self._pass.tokens)
        hidden = tokens * link.views.hidden.shape[1]
        picks = tokens * link.views.ids.shape[1]
        regions = link.layout.regions(
            link.arena, tokens=tokens, rows=len(link.views.rows), ids=picks, weights=picks
        )
        if flags & Do.TAKE:
            regions += link.layout.regions(self.links[peer].arena, word=1, hidden=hidden)
        return regions

    def _close(self, link: LayerLink) -> None:
        """Wait until the planner's step on a device, if there is one, has been answered."""
        if link.open is not None:
            self._await(link, link.open.id)

    def _await(self, link: LayerLink, step: int = 0) -> None:
        """Wait until a device has answered a step, or what was sent last: nothing else can wait.

        Raises:
            StorageError: an expert could not be read; nothing is under way any more.
        """
        wanted, deadline = step or link.sent, time.monotonic() + _STEP_BOUND_S
        while True:
            bell = self.fabric.bell()
            self._receive(link)
            if link.answered >= wanted:
                break
            for other in self.links:
                self._receive(other)  # one that failed keeps the others waiting
            if self.traffic.moves:
                self._check(self._layer, self._wanted)
            if time.monotonic() > deadline:
                raise PeerStalledError(link.name, _STEP_BOUND_S)
            self.fabric.wait(bell, _SPIN_US, _WAIT_MS)
        if link.given_up and not step:
            self._blame(link)

    def _abort(self) -> None:
        """Let every device give up what it has, and wait until each has answered."""
        for link in self.links:
            link.sender.send(Tag.ABORT, STEP_ID.pack(self._step_id), (), _SEND_BOUND_S)
        deadline = time.monotonic() + _STEP_BOUND_S
        for link in self.links:
            while link.answered < link.sent:
                bell = self.fabric.bell()
                self._receive(link)
                if time.monotonic() > deadline:
                    raise PeerStalledError(link.name, _STEP_BOUND_S)
                if link.answered < link.sent:
                    self.fabric.wait(bell, _SPIN_US, _WAIT_MS)

    def _receive(self, link: LayerLink) -> None:
        """Take a device's answers.

        Raises:
            DeviceError: it cannot go on; names it and says why.
        """
        while (message := link.receiver.try_recv(self._buffer)) is not None:
            tag, nbytes = message
            if tag == Tag.FAULT:
                text = self._buffer[:nbytes].decode(errors="replace")
                raise DeviceError(f"{link.name}: {text}")
            if tag == Tag.COPIED:
                self.traffic.ended(self._buffer, nbytes)
                continue
            link.answered, aborted, _, computed_ns, waited_ns = DONE.unpack_from(self._buffer)
            if aborted:
                link.given_up.add(link.answered)
            self._answered(link, waited_ns, aborted=bool(aborted))
            self.counters.compute_s += computed_ns / 1e9
            self.counters.stall_s += waited_ns / 1e9

    def _answered(self, link: LayerLink, waited_ns: int, *, aborted: bool) -> None:
        """Tell the planner of the step that a device has answered for."""
        step = link.open
        if step is None or link.answered < step.id:
            return
        link.open = None
        if step.is_last and not aborted:
            self.placed.close(link.number, step.layer)
            if self.looks_ahead:
                self.traffic.answered(step.layer, waited_ns / 1e9)
        else:
            self.placed.answered(link.number, step.layer, aborted=aborted)

    def _blame(self, link: LayerLink) -> None:
        """Raise what made a device give a step up: the one before it has failed or died."""
        link.given_up.clear()
        for other in self.links:
            if other is not link:
                self._receive(other)
        raise EngineError(f"{link.name} gave a step up, and no other device has failed")
