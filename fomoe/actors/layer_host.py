"""The driver's hands where devices host whole layers: carries a pass through them, half by half.

A message asks for the back of a layer and, where the next layer is on the same device, for its
front: one message each way and layer. Where the next layer is elsewhere both devices are told at
once, and the second waits for the first one's residual stream, which lies in shared memory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Fabric
from fomoe.actors.layer_calls import NO_COPIES, LayerCalls, Orders, Records
from fomoe.actors.layer_link import LayerLink, OpenStep
from fomoe.actors.layer_sweeps import LayerSweeps
from fomoe.actors.layer_traffic import FROM_SCORES, FROM_STREAM, LayerTraffic
from fomoe.actors.messages import Do
from fomoe.engine.decisions import Decider
from fomoe.engine.device_forward import Pass
from fomoe.engine.placed import Placed
from fomoe.errors import EngineError
from fomoe.model.buffers import F32
from fomoe.residency import LogicalCache
from fomoe.routing import Route

I32 = npt.NDArray[np.int32]


class DeviceLayers:
    """Layers on any number of devices; see `LayerHost`."""

    def __init__(
        self, fabric: Fabric, links: list[LayerLink], placed: Placed, traffic: LayerTraffic, *,
        n_states: int,
    ) -> None:  # fmt: skip
        self.links = links
        self.n_states = n_states
        self.placed = placed
        self.traffic = traffic
        self._calls = LayerCalls(fabric, links, placed, traffic)
        self._sweeps = LayerSweeps(self, placed, traffic)
        self.counters = placed.counters
        self.expert_bytes = placed.expert_bytes
        self._home: list[LayerLink] = [links[d] for d in placed.topology.layer_device]
        self._with_token = Do.LOGITS  # what a token's pass ends with: what the last one's was for
        self._has = 0  # of the pass's last row
        self._awaited = 0  # layer whose scores are waited for

    def settle(self) -> None:
        """Take what devices and storage have reported while nobody waited for a step.

        Raises:
            DeviceError: a device cannot go on.
        """
        self._calls.listen()
        self.traffic.settle()

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
        self._calls.send(self._home[0], Do.EMBED | Do.FRONT, 0)

    def scores(self, layer: int) -> F32:
        """Wait for the layer's front; its scores float32 [T, E] stand until the next call."""
        link, self._awaited = self._home[layer], layer
        self._calls.wait(link, foresee=self._foresee if self.traffic.looks_ahead else None)
        scores: F32 = link.views.scores_of(layer)[: len(self._calls.step.tokens)]
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
        self._calls.close(self._home[layer])
        for link in self.links:
            if self.placed.planner.is_tight(layer):
                self._calls.close(link)
        self.traffic.settle()

    def _go(self, layer: int, reads: int, back: int, *, decoding: bool = True) -> None:
        """Send the step that was planned last, and the back of its layer."""
        placed, link = self.placed, self._home[layer]
        planner = placed.planner
        self._calls.wanted = layer, planner.arrays.experts[: planner.n_experts]
        self.traffic.read(layer, reads)
        if self.traffic.looks_ahead and decoding:
            self.traffic.asked(layer, reads)
        while not placed.is_last:  # the slots that experts pass through do not hold all of them
            self._calls.send(link, 0, layer, orders=(planner.step_copies, NO_COPIES))
            self.traffic.bring(layer)
            link.open = OpenStep(self._calls.step_id, layer, is_last=False)
            self._calls.close(link)
            self.traffic.read(layer, placed.more(decoding=decoding))
        placed.picks((link.views.ids[0], link.views.weights[0]))
        if self.traffic.moves:
            self._carry_on(layer, back, planner.step_copies)
        else:
            placed.close(link.number, layer)
            self._carry_on(layer, back)

    def _look_ahead(self, layer: int) -> None:
        """Bring what the next layer will want, by what its router says of this one's stream."""
        if self.traffic.looks_ahead and self._calls.step.overlap and layer + 1 < len(self._home):
            scores = self._home[layer].views.ahead_of(layer)
            self.traffic.look_ahead(layer + 1, scores, FROM_SCORES)

    def _foresee(self) -> None:
        """Bring what the layer that is waited for will want, by the stream that goes into it."""
        assert self._calls.foreseen is not None
        (layer, link), self._calls.foreseen = self._calls.foreseen, None
        if self._calls.step.overlap and layer == self._awaited:
            self.traffic.look_ahead(layer, link.views.foreseen, FROM_STREAM)

    def _sweep(self, layer: int, route: Route, *, exact: bool) -> None:
        if not exact:
            raise EngineError(f"layer {layer}: a prompt takes the router's own choice")
        for link in self.links:
            self._calls.close(link)
        self.traffic.settle()
        self._sweeps.run(layer, route, self._home[layer])
        self._carry_on(layer, Do.COMBINE)

    def send_wave(self, layer: int, what: int, orders: Orders) -> int:
        """See `WaveHost`."""
        self._calls.send(self._home[layer], what, layer, orders=orders)
        return self._calls.step_id

    def hear(self, layer: int, experts: I32) -> None:
        """See `WaveHost`."""
        self._calls.wanted = layer, experts
        self._calls.hear(self._home[layer])

    def finish(self) -> None:
        """Wait for the last layer's back."""
        self._calls.wait(self._home[-1])

    def run_whole(self, step: Pass, *, decoding: bool) -> I32:
        """Run all layers with the router's own choice; returns it, int32 [L, T, k]."""
        self._open(step)
        link, tokens = self.links[0], len(step.tokens)
        self._calls.send(link, Do.WHOLE | self._end_of_token(), 0)
        self._calls.wait(link)
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
            self._calls.send(link, what, 0, rows=len(rows))
            self._calls.wait(link)
        return link

    def _end_of_token(self) -> int:
        """Return what to ask for with a token's last layer; it spares a message."""
        if len(self._calls.step.tokens) > 1:
            return 0
        self._home[-1].views.rows[0] = 0
        self._has = self._with_token
        return self._has

    def copy_state(self, to: int, origin: int, length: int) -> None:
        """Make state `to` what state `origin` is after `length` tokens."""
        self._calls.copy_state(to, origin, length)

    def _open(self, step: Pass) -> None:
        self._calls.open(step)
        if self.traffic.looks_ahead and len(step.tokens) == 1:
            self.traffic.token()
        self._has = 0
        first = self._home[0]
        first.views.tokens[: len(step.tokens)] = step.tokens

    def _carry_on(self, layer: int, back: int, copies: Records = NO_COPIES) -> None:
        """Send the back of `layer`, and the front of the next as far as nobody must be asked."""
        here, overlap = self._home[layer], self._calls.step.overlap
        if layer + 1 == len(self._home):
            self._send_back(here, back | self._end_of_token(), layer, copies)
            return
        there = self._home[layer + 1]
        if there is here:
            if overlap:
                self._send_back(here, back | Do.FRONT, layer, copies)
                return
            self._send_back(here, back, layer, copies)
            self._calls.wait(here)
            self._calls.send(here, Do.FRONT, layer + 1)
            return
        self._send_back(here, back | Do.GIVE, layer, copies, peer=there.number)
        word = self._calls.step_id
        if not overlap or here.node != there.node:
            self._calls.wait(here)
        self._calls.send(there, Do.TAKE | Do.FRONT, layer + 1, peer=here.number, awaited=word)

    def _send_back(
        self, link: LayerLink, flags: int, layer: int, copies: Records, *, peer: int = 0
    ) -> None:
        """Send the back of a layer; its slots are the device's until it has answered."""
        self._calls.send(link, flags, layer, peer=peer, orders=(copies, NO_COPIES))
        if self.traffic.moves and flags & Do.BACK:
            link.open = OpenStep(self._calls.step_id, layer, is_last=True)
            self.traffic.bring(layer)
