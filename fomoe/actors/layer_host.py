"""The driver's hands where layers run on GPUs: carries a pass through them, half by half.

Decides each layer's experts and has them brought; where the rest of a layer runs is `Dense`'s.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.actors.layer_calls import NO_COPIES, LayerCalls, Orders
from fomoe.actors.layer_dense import Dense
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
        self, calls: LayerCalls, links: list[LayerLink], placed: Placed, traffic: LayerTraffic,
        dense: Dense, *, n_states: int,
    ) -> None:  # fmt: skip
        self.links = links
        self.n_states = n_states
        self.placed = placed
        self.traffic = traffic
        self._calls = calls
        self._dense = dense
        self._sweeps = LayerSweeps(self, placed, traffic)
        self.counters = placed.counters
        self.expert_bytes = placed.expert_bytes
        self._home: list[LayerLink] = [links[d] for d in placed.topology.layer_device]

    def settle(self) -> None:
        """Take what devices and storage have reported while nobody waited for a step.

        Raises:
            DeviceError: a device cannot go on.
        """
        self._calls.settle()

    @property
    def runs_whole(self) -> bool:
        """Whether one device hosts every layer and holds every expert."""
        return self._dense.runs_whole and len(self.links) == 1 and self.placed.on_devices

    def follow(self, logical: LogicalCache | None) -> None:
        """Keep at hand what this cache takes as resident, as it changes; None: nothing."""
        self.placed.follow(logical)

    def open(self, step: Pass) -> None:
        """Embed the tokens and begin the front of the first layer."""
        self._calls.open(step)
        self._dense.open(step)
        if self.traffic.looks_ahead and len(step.tokens) == 1:
            self.traffic.token()

    def scores(self, layer: int) -> F32:
        """Wait for the layer's front; its scores float32 [T, E] stand until the next call."""
        foresee = self._foresee if self.traffic.looks_ahead else None
        return self._dense.scores(layer, foresee)

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
            reads = self.placed.place(layer, route)
            back = Do.BACK | Do.CHOOSE if exact else Do.BACK
            self._go(layer, reads, back, decoding=decoding)
        elif self.traffic.moves:
            self._sweep(layer, route, exact=exact)
        else:
            self.placed.count_hits(route.ids.size, decoding=decoding)
            if not exact:
                link.views.ids[:tokens] = route.ids
                link.views.weights[:tokens] = route.weights
            self._dense.carry_on(layer, Do.BACK | Do.CHOOSE if exact else Do.BACK, NO_COPIES)

    def read_later(self, layer: int, experts: I32) -> None:
        """Load experts that were wanted and did not run, behind all demand; never waits."""
        if self.traffic.moves:
            self.traffic.read_later(layer, experts)

    def _settle(self, layer: int) -> None:
        """Wait for what the layer's next step may not overtake, and hear what storage says."""
        if not self.traffic.moves:
            return
        self._calls.close(self._home[layer])
        for link in self.links:  # an arm's choice may not depend on who has answered by now
            if not (self._calls.arm.on or self.placed.planner.is_tight(layer)):
                break
            self._calls.close(link)
        self.traffic.settle()

    def _go(self, layer: int, reads: int, back: int, *, decoding: bool = True) -> None:
        """Send the step that was planned last, and the back of its layer; count it afterwards."""
        placed, link = self.placed, self._home[layer]
        planner, stays = placed.planner, placed.n_stay > 0
        self._calls.wanted = layer, planner.arrays.experts[: planner.n_experts]
        if reads:
            self.traffic.read(layer, reads)
        if self.traffic.looks_ahead and decoding:
            self.traffic.asked(layer, reads)
        while not placed.is_last:  # the slots that experts pass through do not hold all of them
            self._calls.send(link, 0, layer, orders=(planner.step_copies, NO_COPIES))
            self.traffic.bring(layer)
            link.open = OpenStep(self._calls.step_id, layer, is_last=False)
            self._calls.close(link)
            self.traffic.read(layer, placed.more(decoding=decoding))
        if stays:
            placed.part_picks(link.picks)
            back = Do.BACK | Do.PART
        else:
            placed.picks(link.picks)
        if self.traffic.moves:
            self._dense.carry_on(layer, back, planner.step_copies)
        else:
            self._dense.carry_on(layer, back, NO_COPIES)
            placed.close(link.number, layer)
        placed.charge(decoding=decoding)

    def _look_ahead(self, layer: int) -> None:
        """Bring what the next layer will want, by what its router says of this one's stream."""
        if not self.traffic.looks_ahead or not self._calls.step.overlap:
            return
        self.traffic.give_up_guesses(layer)
        if layer + 1 < len(self._home):
            self.traffic.look_ahead(layer + 1, self._dense.ahead(layer), FROM_SCORES)

    def _foresee(self, layer: int, scores: F32) -> None:
        """Bring what the layer that is waited for will want, by the stream that goes into it."""
        if self._calls.step.overlap:
            self.traffic.look_ahead(layer, scores, FROM_STREAM)

    def _sweep(self, layer: int, route: Route, *, exact: bool) -> None:
        if not exact:
            raise EngineError(f"layer {layer}: a prompt takes the router's own choice")
        for link in self.links:
            self._calls.close(link)
        self.traffic.settle()
        self._sweeps.run(layer, route, self._home[layer])
        self._dense.carry_on(layer, Do.COMBINE, NO_COPIES)

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
        self._dense.finish()

    def run_whole(self, step: Pass, *, decoding: bool) -> I32:
        """Run all layers with the router's own choice; returns it, int32 [L, T, k]."""
        self._calls.open(step)
        chosen = self._dense.run_whole(step)
        self.placed.count_hits(chosen.size, decoding=decoding)
        return chosen

    def logits(self, rows: npt.NDArray[np.intp]) -> F32:
        """Return the logits [n, V] of some rows of the last pass, until the next call."""
        return self._dense.logits(rows)

    def largest(self, row: int) -> tuple[int, float]:
        """Return id and value of the greatest logit of a row of the last pass."""
        return self._dense.largest(row)

    def copy_state(self, to: int, origin: int, length: int) -> None:
        """Make state `to` what state `origin` is after `length` tokens."""
        self._dense.copy_state(to, origin, length)
