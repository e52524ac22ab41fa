"""Where all of a layer but its routed experts runs: on the device that has those, by messages.

A message asks for the back of a layer and, where the next layer is on the same device, for its
front: one message each way and layer. Where the next layer is elsewhere both devices are told at
once, and the second waits for the first one's residual stream, which lies in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fomoe.actors.layer_calls import LayerCalls, Records
from fomoe.actors.layer_link import LayerLink
from fomoe.actors.messages import Do
from fomoe.engine.device_forward import Pass
from fomoe.model.buffers import F32

I32 = npt.NDArray[np.int32]
Foresee = Callable[[int, F32], None]  # told a layer and its router's scores float32 [1, E]


class Dense(Protocol):
    """The dense part of all layers; verbs come in the order of a pass, see `LayerHost`."""

    @property
    def runs_whole(self) -> bool:
        """Whether a pass can be one call where every expert is on the one device."""

    def open(self, step: Pass) -> None:
        """Embed the tokens of a pass."""

    def scores(self, layer: int, foresee: Foresee | None) -> F32:
        """Wait for the layer's front; its scores float32 [T, E] stand until the next call.

        `foresee` is told on the way, if it is known in time, what the layer's router says of a
        token's stream that goes into the layer.
        """

    def ahead(self, layer: int) -> F32:
        """Return what the layer's front says of the next one's router, float32 [1, E]."""

    def carry_on(self, layer: int, back: int, copies: Records) -> None:
        """Have experts run (`Do`), with what is copied for them, and go on as far as can be."""

    def finish(self) -> None:
        """Wait for the last layer."""

    def run_whole(self, step: Pass) -> I32:
        """Run all layers with the router's own choice; returns it, int32 [L, T, k]."""

    def logits(self, rows: npt.NDArray[np.intp]) -> F32:
        """Return the logits [n, V] of some rows of the last pass, until the next call."""

    def largest(self, row: int) -> tuple[int, float]:
        """Return id and value of the greatest logit of a row of the last pass."""

    def copy_state(self, to: int, origin: int, length: int) -> None:
        """Make state `to` what state `origin` is after `length` tokens."""


class HostedDense:
    """See `Dense`; `home` is each layer's device."""

    runs_whole = True

    def __init__(self, calls: LayerCalls, home: list[LayerLink]) -> None:
        self._calls = calls
        self._home = home
        self._front = Do.FRONT | Do.INPUT if calls.arm.on else Do.FRONT
        self._with_token = Do.LOGITS  # what a token's pass ends with: what the last one's was for
        self._has = 0  # of the pass's last row
        self._awaited: tuple[int, Foresee | None] = 0, None  # layer, and who hears of it

    def open(self, step: Pass) -> None:
        """Embed the tokens and begin the front of the first layer."""
        self._show_tokens(step)
        self._calls.send(self._home[0], Do.EMBED | self._front, 0)

    def _show_tokens(self, step: Pass) -> None:
        self._has = 0
        self._home[0].views.tokens[: len(step.tokens)] = step.tokens

    def scores(self, layer: int, foresee: Foresee | None) -> F32:
        """Wait for the layer's front; its scores float32 [T, E] stand until the next call."""
        link, self._awaited = self._home[layer], (layer, foresee)
        self._calls.wait(link, foresee=None if foresee is None else self._hear)
        scores: F32 = link.views.scores_of(layer)[: len(self._calls.step.tokens)]
        return scores

    def _hear(self) -> None:
        """Tell what a device has foreseen, if it is of the layer that is waited for."""
        assert self._calls.foreseen is not None
        (layer, link), self._calls.foreseen = self._calls.foreseen, None
        awaited, foresee = self._awaited
        if layer == awaited and foresee is not None:
            foresee(layer, link.views.foreseen)

    def ahead(self, layer: int) -> F32:
        """Return what the layer's front says of the next one's router, float32 [1, E]."""
        return self._home[layer].views.ahead_of(layer)

    def carry_on(self, layer: int, back: int, copies: Records) -> None:
        """Send the back of `layer`, and the front of the next as far as nobody must be asked."""
        calls, here, overlap = self._calls, self._home[layer], self._calls.step.overlap
        if layer + 1 == len(self._home):
            calls.send_back(here, back | self._end_of_token(), layer, copies)
            return
        there = self._home[layer + 1]
        if there is here:
            if overlap:
                calls.send_back(here, back | self._front, layer, copies)
                return
            calls.send_back(here, back, layer, copies)
            calls.wait(here)
            calls.send(here, self._front, layer + 1)
            return
        calls.send_back(here, back | Do.GIVE, layer, copies, peer=there.number)
        word = calls.step_id
        if not overlap or here.node != there.node:
            calls.wait(here)
        front = Do.TAKE | self._front
        calls.send(there, front, layer + 1, peer=here.number, awaited=word)

    def finish(self) -> None:
        """Wait for the last layer's back."""
        self._calls.wait(self._home[-1])

    def run_whole(self, step: Pass) -> I32:
        """Run all layers with the router's own choice; returns it, int32 [L, T, k]."""
        self._show_tokens(step)
        link = self._home[0]
        self._calls.send(link, Do.WHOLE | self._end_of_token(), 0)
        self._calls.wait(link)
        return link.views.chosen_of(len(step.tokens))

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
