"""Serves halves of layers on one device: what the driver asks for, in the order of `Do`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Fabric, Sender, load_acquire_u64, store_release_u64
from fomoe.actors.expert_copies import Slots
from fomoe.actors.layer_layout import LayerArena, LayerViews
from fomoe.actors.messages import DONE, LAYERS, Do, Tag
from fomoe.errors import DeviceError
from fomoe.model.buffers import F32

if TYPE_CHECKING:
    from fomoe.kernels.gpu.runtime import Runtime

I32 = npt.NDArray[np.int32]

_SPIN_US = 200.0  # while a token is in flight
_WAIT_MS = 20.0
_SEND_BOUND_S = 5.0
_HIDDEN_BOUND_S = 60.0


class LayerModel(Protocol):
    """The layers of one device; calls queue work, those that return an array wait, with a bound.

    Addresses are of registered host memory. Arrays stand until the next call.
    """

    @property
    def runtime(self) -> Runtime:
        """The device's driver."""

    @property
    def slots(self) -> Slots:
        """Where experts lie."""

    def begin(self, tokens: I32, position: int, state: int) -> None:
        """Begin a pass of tokens int32 [T]."""

    def embed(self) -> None:
        """Take the tokens' embedding as the residual stream."""

    def put_hidden(self, address: int) -> None:
        """Take float32 [T, D] as the residual stream."""

    def take_hidden(self, address: int) -> None:
        """Write the residual stream to an address, and wait for it."""

    def front(self, layer: int) -> None:
        """Run a layer up to the router's scores."""

    def scores(self, layer: int) -> F32:
        """Return the scores float32 [T, E]."""

    def back(self, layer: int, ids: I32, weights: F32) -> None:
        """Run the experts int32 [T, k] and close the layer; one token's ids ascend."""

    def own_back(self, layer: int) -> None:
        """Run the router's own choice, with the bits of a whole pass, and close the layer."""

    def prefill(self, tokens: I32, position: int, state: int) -> I32:
        """Run a whole pass by the router's own choice; returns it, int32 [L, T, k], any order."""

    def logits(self, rows: I32) -> F32:
        """Return logits float32 [n, V] of rows of the last pass."""

    def reset(self, state: int) -> None:
        """Empty a state."""

    def copy_state(self, to: int, origin: int, length: int) -> None:
        """Make a state what another one is after `length` tokens."""

    def close(self) -> None:
        """Give the device's memory back."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A device of the engine: its process, its arena."""

    name: str
    arena: str
    layout: LayerArena


class LayerServer:
    """Runs LAYERS messages on a model; used by one thread."""

    def __init__(
        self, model: LayerModel, fabric: Fabric, number: int, devices: list[Neighbour],
        stopping: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._model = model
        self._fabric = fabric
        self._devices = devices
        self._own = devices[number]
        self._stopping = stopping
        self._views = [d.layout.views(fabric.arena(d.arena)) for d in devices]
        self._mine: LayerViews = self._views[number]
        self._registered = [fabric.arena(d.arena) for d in devices]
        for arena in self._registered:
            model.runtime.register(arena)
        self._to_driver: Sender = fabric.sender("driver")
        self._tokens = 1
        self.steps = 0
        self.compute_ns = self.wait_ns = 0

    def serve(self, message: bytes | bytearray) -> None:
        """Do what a message asks for and answer.

        Raises:
            DeviceError: the device failed, or the one before it gave nothing in time.
        """
        step, awaited, flags, layer, tokens, position, state, peer, rows = LAYERS.unpack_from(
            message
        )
        do, model = Do(flags), self._model
        started, waited = time.perf_counter_ns(), 0
        if do & Do.COPY_STATE:
            model.copy_state(state, peer, position)
        if do & Do.BEGIN:
            self._begin(do, tokens, position, state)
        if do & Do.EMBED:
            model.embed()
        if do & Do.TAKE:
            waited = self._await_hidden(peer, awaited)
            if waited < 0:
                self._to_driver.send(Tag.DONE, DONE.pack(step, 1, 0, 0, 0), (), _SEND_BOUND_S)
                return
            model.put_hidden(self._views[peer].hidden.ctypes.data)
        self._run(do, layer)
        if do & Do.GIVE:
            model.take_hidden(self._mine.hidden.ctypes.data)
            store_release_u64(self._mine.word, 0, step)
            self._fabric.ring(self._devices[peer].name)
        if do & Do.LOGITS:
            np.copyto(self._mine.logits[:rows], model.logits(self._mine.rows[:rows]))
        self._answer(step, do, rows, time.perf_counter_ns() - started - waited, waited)

    def _begin(self, do: Do, tokens: int, position: int, state: int) -> None:
        model, ids = self._model, self._mine.tokens[:tokens]
        self._tokens = tokens
        if position == 0:
            model.reset(state)
        if do & Do.WHOLE:
            np.copyto(self._mine.chosen_of(tokens), model.prefill(ids, position, state))
        else:
            model.begin(ids, position, state)

    def _run(self, do: Do, layer: int) -> None:
        model, mine, tokens = self._model, self._mine, self._tokens
        if do & Do.BACK:
            if do & Do.CHOOSE:
                model.own_back(layer)
            else:
                model.back(layer, mine.ids[:tokens], mine.weights[:tokens])
            layer += 1
        if do & Do.FRONT:
            model.front(layer)
            np.copyto(mine.scores[:tokens], model.scores(layer))

    def _await_hidden(self, peer: int, awaited: int) -> int:
        """Wait for another device's residual stream.

        Returns:
            The nanoseconds that it took; -1 where that device has died, of which the driver hears.
        """
        started = time.perf_counter_ns()
        word, name = self._views[peer].word, self._devices[peer].name
        while True:
            bell = self._fabric.bell()
            if load_acquire_u64(word, 0) >= awaited:
                return time.perf_counter_ns() - started
            if self._fabric.peer_dead(name):
                return -1
            if self._stopping() or time.perf_counter_ns() - started > _HIDDEN_BOUND_S * 1e9:
                raise DeviceError(
                    f"{name} gave no residual stream within {_HIDDEN_BOUND_S:.0f} s; "
                    "its device may hang"
                )
            self._fabric.wait(bell, _SPIN_US, _WAIT_MS)

    def _answer(self, step: int, do: Do, rows: int, compute_ns: int, wait_ns: int) -> None:
        own, tokens = self._own, self._tokens
        counts: dict[str, int] = {}
        if do & Do.FRONT:
            counts["scores"] = tokens * self._mine.scores.shape[1]
        if do & Do.WHOLE:
            counts["chosen"] = self._mine.chosen_of(tokens).size
        if do & Do.GIVE:
            counts |= {"word": 1, "hidden": tokens * self._mine.hidden.shape[1]}
        if do & Do.LOGITS:
            counts["logits"] = rows * self._mine.logits.shape[1]
        payload = DONE.pack(step, 0, 0, compute_ns, wait_ns)
        regions = own.layout.regions(own.arena, **counts)
        self._to_driver.send(Tag.DONE, payload, regions, _SEND_BOUND_S)
        self.steps += 1
        self.compute_ns += compute_ns
        self.wait_ns += wait_ns

    def close(self) -> None:
        """Let go of what other processes map, too."""
        for arena in self._registered:
            self._model.runtime.unregister(arena)
