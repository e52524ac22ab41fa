"""The driver's hands where devices host whole layers: carries a pass through them, half by half.

A message asks for the back of a layer and, where the next layer is on the same device, for its
front: one message each way and layer. Where the next layer is elsewhere both devices are told at
once, and the second waits for the first one's residual stream, which lies in shared memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Fabric, Receiver, Regions, Sender
from fomoe.actors.layer_layout import LayerArena, LayerViews
from fomoe.actors.messages import DONE, LAYERS, Do, Tag
from fomoe.engine.decisions import Decider
from fomoe.engine.device_forward import Pass
from fomoe.engine.placed import Placed
from fomoe.errors import DeviceError, EngineError, PeerStalledError
from fomoe.model.buffers import F32
from fomoe.residency import LogicalCache
from fomoe.routing import Route

I32 = npt.NDArray[np.int32]

_SPIN_US = 300.0  # while a token is in flight
_WAIT_MS = 20.0
_SEND_BOUND_S = 5.0
_STEP_BOUND_S = 120.0


@dataclass(slots=True)
class LayerLink:
    """The driver's ends of one device: its rings, its arena, and the last step it answered."""

    name: str
    number: int
    node: int
    arena: str
    layout: LayerArena
    views: LayerViews
    sender: Sender
    receiver: Receiver
    answered: int = 0
    begun: int = 0  # the pass that it knows of


class DeviceLayers:
    """Layers on any number of devices; see `LayerHost`."""

    def __init__(
        self, fabric: Fabric, links: list[LayerLink], placed: Placed, *, n_states: int
    ) -> None:
        self.fabric = fabric
        self.links = links
        self.n_states = n_states
        self.placed = placed
        self.counters = placed.counters
        self.expert_bytes = placed.expert_bytes
        self._home = [links[d] for d in placed.topology.layer_device]
        self._buffer = bytearray(fabric.spec.slot_bytes)
        self._step_id = 0
        self._passes = 0
        self._pass = Pass(np.zeros(1, np.int32), 0, 0, overlap=True)
        self._has_logits = False

    @property
    def runs_whole(self) -> bool:
        """Whether one device hosts every layer and holds every expert."""
        return len(self.links) == 1 and self.placed.holds_all

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
        scores: F32 = link.views.scores[: len(self._pass.tokens)]
        return scores

    def decide(self, layer: int, scores: F32, logical: LogicalCache) -> None:
        """Route one sequence's token exactly, tell its logical cache, and begin the back."""
        views = self._home[layer].views
        self.placed.decide(layer, scores, logical, (views.ids[0], views.weights[0]))
        self._carry_on(layer, Do.BACK | Do.CHOOSE)

    def decide_by(self, layer: int, scores: F32, decider: Decider, prices: F32 | None) -> None:
        """Let a rule choose for one sequence's token, and begin the back."""
        views = self._home[layer].views
        self.placed.decide_by(layer, scores, decider, prices, (views.ids[0], views.weights[0]))
        self._carry_on(layer, Do.BACK)

    def begin(self, layer: int, route: Route, *, decoding: bool, exact: bool) -> None:
        """Begin the back with a route that was made elsewhere; `exact`: it is the router's own."""
        views, tokens = self._home[layer].views, len(route.ids)
        if tokens == 1:
            self.placed.place(layer, route, (views.ids[0], views.weights[0]), decoding=decoding)
        else:
            self.placed.count_hits(route.ids.size, decoding=decoding)
            if not exact:
                views.ids[:tokens] = route.ids
                views.weights[:tokens] = route.weights
        self._carry_on(layer, Do.BACK | Do.CHOOSE if exact else Do.BACK)

    def read_later(self, layer: int, experts: I32) -> None:
        """Every expert is on its device already."""

    def finish(self) -> None:
        """Wait for the last layer's back."""
        self._await(self._home[-1])

    def run_whole(self, step: Pass, *, decoding: bool) -> I32:
        """Run all layers with the router's own choice; returns it, int32 [L, T, k]."""
        self._open(step)
        link, tokens = self.links[0], len(step.tokens)
        flags = Do.WHOLE
        if tokens == 1:
            flags |= Do.LOGITS
            self._has_logits = True
        self._send(link, flags, 0)
        self._await(link)
        self.placed.count_hits(link.views.chosen_of(tokens).size, decoding=decoding)
        return link.views.chosen_of(tokens)

    def logits(self, rows: npt.NDArray[np.intp]) -> F32:
        """Return the logits [n, V] of some rows of the last pass, until the next call."""
        link = self._home[-1]
        if not self._has_logits:
            link.views.rows[: len(rows)] = rows
            self._send(link, Do.LOGITS, 0, rows=len(rows))
            self._await(link)
        logits: F32 = link.views.logits[: len(rows)]
        return logits

    def copy_state(self, to: int, origin: int, length: int) -> None:
        """Make state `to` what state `origin` is after `length` tokens."""
        for link in self.links:
            payload = self._next(int(Do.COPY_STATE), 0, 0, (0, length, to, origin, 0))
            link.sender.send(Tag.LAYERS, payload, (), _SEND_BOUND_S)

    def _open(self, step: Pass) -> None:
        self._pass = step
        self._passes += 1
        self._has_logits = False
        first = self._home[0]
        first.views.tokens[: len(step.tokens)] = step.tokens

    def _carry_on(self, layer: int, back: Do) -> None:
        """Send the back of `layer`, and the front of the next as far as nobody must be asked."""
        here, overlap = self._home[layer], self._pass.overlap
        if layer + 1 == len(self._home):
            self._close(here, layer, back)
            return
        there = self._home[layer + 1]
        if there is here:
            if overlap:
                self._send(here, back | Do.FRONT, layer)
                return
            self._send(here, back, layer)
            self._await(here)
            self._send(here, Do.FRONT, layer + 1)
            return
        self._send(here, back | Do.GIVE, layer, peer=there.number)
        word = self._step_id
        if not overlap or here.node != there.node:
            self._await(here)
        self._send(there, Do.TAKE | Do.FRONT, layer + 1, peer=here.number, awaited=word)

    def _close(self, link: LayerLink, layer: int, back: Do) -> None:
        """Send the last layer's back; a token's logits come with it."""
        if len(self._pass.tokens) == 1 and self._pass.overlap:
            self._has_logits = True
            self._send(link, back | Do.LOGITS, layer)
        else:
            self._send(link, back, layer)

    def _send(
        self, link: LayerLink, flags: Do, layer: int, *, peer: int = 0, awaited: int = 0,
        rows: int = 1,
    ) -> None:  # fmt: skip
        step = self._pass
        if link.begun != self._passes:
            link.begun = self._passes
            flags |= Do.BEGIN
        if flags & Do.LOGITS and self._has_logits:
            link.views.rows[0] = 0
        payload = self._next(
            int(flags), layer, awaited, (len(step.tokens), step.position, step.state, peer, rows)
        )
        link.sender.send(Tag.LAYERS, payload, self._regions(link, flags, peer), _SEND_BOUND_S)

    def _next(
        self, flags: int, layer: int, awaited: int, rest: tuple[int, int, int, int, int]
    ) -> bytes:
        self._step_id += 1
        return LAYERS.pack(self._step_id, awaited, flags, layer, *rest)

    def _regions(self, link: LayerLink, flags: Do, peer: int) -> Regions:
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

    def _await(self, link: LayerLink) -> None:
        """Wait until a device has answered what was sent last: the only place that can."""
        wanted, deadline = self._step_id, time.monotonic() + _STEP_BOUND_S
        while True:
            bell = self.fabric.bell()
            self._receive(link)
            if link.answered >= wanted:
                return
            for other in self.links:
                self._receive(other)  # one that failed keeps the others waiting
            if time.monotonic() > deadline:
                raise PeerStalledError(link.name, _STEP_BOUND_S)
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
            link.answered, aborted, _, computed_ns, waited_ns = DONE.unpack_from(self._buffer)
            if aborted:
                self._blame(link)
            self.counters.compute_s += computed_ns / 1e9
            self.counters.stall_s += waited_ns / 1e9

    def _blame(self, link: LayerLink) -> None:
        """Raise what made a device give a step up: the one before it has failed or died."""
        for other in self.links:
            if other is not link:
                self._receive(other)
        raise EngineError(f"{link.name} gave a step up, and no other device has failed")
