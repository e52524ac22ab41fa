"""Serves halves of layers on one device: what the driver asks for, in the order of `Do`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Fabric, Regions, Sender, load_acquire_u64, store_release_u64
from fomoe.actors.expert_copies import ExpertCopies, Slots
from fomoe.actors.layer_layout import LayerArena, LayerViews
from fomoe.actors.messages import DONE, FORESEEN, LAYERS, Do, Tag
from fomoe.engine.copies import COPY
from fomoe.engine.transfers import ENTRY
from fomoe.errors import DeviceError
from fomoe.model.buffers import F32

if TYPE_CHECKING:
    from fomoe.kernels.gpu.runtime import Runtime

I32 = npt.NDArray[np.int32]

_SPIN_US = 1000.0  # while a token is in flight: as long as a layer may take elsewhere
_WAIT_MS = 20.0
_SEND_BOUND_S = 5.0
_BOUND_S = 120.0
_ENDS = Do.GIVE | Do.LOGITS | Do.LARGEST  # what waits for the device's work


class LayerModel(Protocol):
    """The layers of one device; calls queue work, those that return an array wait, with a bound.

    Addresses are of registered host memory, the host's own where nothing else is said. Arrays stand
    until the next call.
    """

    @property
    def runtime(self) -> Runtime:
        """The device's driver."""

    @property
    def stream(self) -> int:
        """What computes; work waits for events that this stream is told to wait for."""

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

    def ahead(self) -> F32 | None:
        """Return what the next layer's router would say, float32 [1, E], with the last scores.

        None where the device does not compute it.
        """

    def foreseen(self) -> tuple[int, F32] | None:
        """Return a layer and its router's scores float32 [1, E] of the stream that goes into it.

        Once for each layer, when the device has them; None until then, and where it has none.
        """

    def back(self, layer: int, ids: I32, weights: F32) -> None:
        """Run the experts int32 [T, k] and close the layer; one token's ids ascend."""

    def own_back(self, layer: int) -> None:
        """Run the router's own choice, with the bits of a whole pass, and close the layer."""

    def gather(self, layer: int) -> None:
        """Begin the experts of a prompt's chunk: the router's own choice, sorted by expert."""

    def wave(self, layer: int, experts: I32, slots: I32) -> None:
        """Run the chunk's pairs of experts int32 [n] that lie in slots int32 [n]."""

    def combine(self, layer: int) -> None:
        """Close the layer once every pair has run."""

    def prefill(self, tokens: I32, position: int, state: int) -> I32:
        """Run a whole pass by the router's own choice; returns it, int32 [L, T, k], any order."""

    def logits(self, rows: I32) -> F32:
        """Return logits float32 [n, V] of rows of the last pass."""

    def largest(self, row: int) -> tuple[int, float, float]:
        """Return id and value of a row's greatest logit (ties: the lower id), and its log sum."""

    def reset(self, state: int) -> None:
        """Empty a state."""

    def copy_state(self, to: int, origin: int, length: int) -> None:
        """Make a state what another one is after `length` tokens."""

    def close(self) -> None:
        """Give the device's memory back."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A device of the engine: its process, its arena; devices of one `link` share it."""

    name: str
    arena: str
    layout: LayerArena
    link: str = ""


class LayerServer:
    """Runs LAYERS messages on a model; used by one thread.

    `listen` takes what has come meanwhile, and is called while a step waits. `moves` says that
    slots change hands, so that an answer is given when nothing reads them any more. `remote` says
    that the driver is on another box, which then gets what its answers are about.
    """

    def __init__(
        self, model: LayerModel, copies: ExpertCopies, fabric: Fabric,
        devices: tuple[list[Neighbour], int], listen: Callable[[], None], *, moves: bool,
        remote: bool,
    ) -> None:  # fmt: skip
        self._model = model
        self._copies = copies
        self._fabric = fabric
        self._devices, number = devices
        self._own = self._devices[number]
        self._listen = listen
        self._moves = moves
        self._remote = remote
        self._views = [d.layout.views(fabric.arena(d.arena)) for d in self._devices]
        self._mine: LayerViews = self._views[number]
        self._registered = [fabric.arena(d.arena) for d in self._devices]
        self._hidden = [  # as the device sees each
            model.runtime.register(arena) + views.hidden.ctypes.data - arena.ctypes.data
            for arena, views in zip(self._registered, self._views, strict=True)
        ]
        self._to_driver: Sender = fabric.sender("driver")
        self._computed = model.runtime.event()
        self._tokens = 1
        self._aborted = 0  # steps up to this one were given up
        self._waited = 0
        self.steps = 0
        self.compute_ns = self.wait_ns = 0

    def take(self, message: bytes | bytearray) -> None:
        """Begin with the copies of a message that is served later, or next."""
        step, *_, n_copies, _ = LAYERS.unpack_from(message)
        if n_copies:
            self._copies.order(np.frombuffer(message, COPY, n_copies, LAYERS.size), step)

    def abort(self, step: int) -> None:
        """Give up the steps up to this one, where they wait for bytes that will never come."""
        self._aborted = max(self._aborted, step)

    def serve(self, message: bytes | bytearray) -> None:
        """Do what a message asks for and answer.

        Raises:
            DeviceError: the device failed, or the one before it gave nothing in time.
        """
        step, awaited, do, layer, tokens, position, state, peer, rows, n_copies, _ = (
            LAYERS.unpack_from(message)
        )
        model = self._model
        started, self._waited = time.perf_counter_ns(), 0
        if do & Do.COPY_STATE:
            model.copy_state(state, peer, position)
        if do & Do.BEGIN:
            self._begin(do, tokens, position, state)
        if do & Do.EMBED:
            model.embed()
        is_here = self._bring(step) if n_copies else True
        if is_here and do & Do.TAKE:
            is_here = self._await_hidden(peer, awaited, step)
        if not is_here:
            self._give_up(step)
            return
        if do & Do.TAKE:
            model.put_hidden(self._hidden[peer])
        self._run(do, layer, message)
        if self._moves and do & _ENDS:
            self._watch_loads(step)
        self._give(do, step, peer, rows)
        if self._moves:
            self._close(step, do)
        self._answer(step, do, rows, time.perf_counter_ns() - started - self._waited, self._waited)

    def _give(self, do: int, step: int, peer: int, rows: int) -> None:
        """Hand over the residual stream, or what the head makes of it."""
        model = self._model
        if do & Do.GIVE:
            model.take_hidden(self._mine.hidden.ctypes.data)
            store_release_u64(self._mine.word, 0, step)
            self._fabric.ring(self._devices[peer].name)
            self._foresee()
        if do & Do.LOGITS:
            np.copyto(self._mine.logits[:rows], model.logits(self._mine.rows[:rows]))
        if do & Do.LARGEST:
            self._mine.best[0], self._mine.best_logit[0], _ = model.largest(int(self._mine.rows[0]))

    def _bring(self, step: int) -> bool:
        """Let the compute stream wait for a step's copies; False where they will never come."""
        copies = self._copies
        if not copies.has_begun(step):
            self._wait(lambda: copies.has_begun(step) or step <= self._aborted, "an expert's bytes")
            if not copies.has_begun(step):
                return False
        copies.hold(step, self._model.stream)
        return True

    def _close(self, step: int, do: int) -> None:
        """Wait until every copy of a step has ended, and what computes with them."""
        copies = self._copies
        if do & (Do.BACK | Do.COMBINE) and not do & (_ENDS | Do.FRONT):
            self._finish_computing()
        copies.advance_steps()
        if not copies.has_ended(step):
            self._wait(lambda: copies.has_ended(step), "a copy")

    def _watch_loads(self, step: int) -> None:
        """See a step's copies end, so that others may use the link while this device computes."""
        if not self._copies.has_ended(step):
            self._wait(lambda: self._copies.has_ended(step), "a copy", nap=False)

    def _finish_computing(self) -> None:
        runtime = self._model.runtime
        runtime.record(self._computed, self._model.stream)
        if not runtime.done(self._computed):
            self._wait(lambda: runtime.done(self._computed), "a layer", nap=False)

    def _give_up(self, step: int) -> None:
        """Answer for a step that nobody wants any more, once it touches no memory."""
        copies = self._copies
        copies.abort(step)
        self._wait(lambda: copies.has_ended(step), "a copy")
        self._to_driver.send(Tag.DONE, DONE.pack(step, 1, 0, 0, 0), (), _SEND_BOUND_S)

    def _wait(self, ready: Callable[[], bool], what: str, *, nap: bool = True) -> None:
        """Bring copies on their way, and hear what comes, until `ready`.

        Raises:
            DeviceError: it is not after two minutes.
        """
        started = time.perf_counter_ns()
        while True:
            bell = self._fabric.bell()
            if ready():
                break
            self._copies.advance()
            self._listen()
            self._foresee()
            if time.perf_counter_ns() - started > _BOUND_S * 1e9:
                raise DeviceError(f"{what} has not come within {_BOUND_S:.0f} s")
            if nap and not self._copies.under_way and not ready():
                self._fabric.wait(bell, _SPIN_US, _WAIT_MS)
        if nap:  # not for the device's own work
            self._waited += time.perf_counter_ns() - started

    def _begin(self, do: int, tokens: int, position: int, state: int) -> None:
        model, ids = self._model, self._mine.tokens[:tokens]
        self._tokens = tokens
        if position == 0:
            model.reset(state)
        if do & Do.WHOLE:
            np.copyto(self._mine.chosen_of(tokens), model.prefill(ids, position, state))
        else:
            model.begin(ids, position, state)

    def _run(self, do: int, layer: int, message: bytes | bytearray) -> None:
        model, mine, tokens = self._model, self._mine, self._tokens
        if do & Do.GATHER:
            model.gather(layer)
        if do & Do.WAVE:
            self._run_wave(layer, message)
        if do & Do.COMBINE:
            model.combine(layer)
            layer += 1
        if do & Do.BACK:
            if do & Do.CHOOSE:
                self._copies.publish(layer)
                model.own_back(layer)
            else:
                model.back(layer, mine.ids[:tokens], mine.weights[:tokens])
            layer += 1
        if do & Do.FRONT:
            self._run_front(layer)

    def _run_wave(self, layer: int, message: bytes | bytearray) -> None:
        *_, n_copies, n_entries = LAYERS.unpack_from(message)
        at = LAYERS.size + n_copies * COPY.itemsize
        entries = np.frombuffer(message, ENTRY, n_entries, at)
        self._model.wave(layer, entries["expert"].copy(), entries["slot"].copy())
        self._finish_computing()

    def _run_front(self, layer: int) -> None:
        model, mine = self._model, self._mine
        model.front(layer)
        if self._moves:  # what comes for later steps is not to wait for this one
            self._finish_computing()
        np.copyto(mine.scores_of(layer)[: self._tokens], model.scores(layer))
        if (ahead := model.ahead()) is not None:
            np.copyto(mine.ahead_of(layer), ahead)

    def _foresee(self) -> None:
        """Tell the driver what the next layer's router says of the stream that goes into it."""
        found = self._model.foreseen()
        if found is None:
            return
        layer, scores = found
        np.copyto(self._mine.foreseen, scores)
        regions: Regions = ()
        if self._remote:
            regions = self._own.layout.regions(self._own.arena, foreseen=scores.size)
        self._to_driver.send(Tag.FORESEEN, FORESEEN.pack(layer), regions, _SEND_BOUND_S)

    def _await_hidden(self, peer: int, awaited: int, step: int) -> bool:
        """Wait for another device's residual stream; False where it has died or been given up."""
        word, name = self._views[peer].word, self._devices[peer].name
        if load_acquire_u64(word, 0) >= awaited:
            return True

        def is_over() -> bool:
            given = load_acquire_u64(word, 0) >= awaited
            return given or step <= self._aborted or self._fabric.peer_dead(name)

        self._wait(is_over, f"the residual stream of {name}")
        return bool(load_acquire_u64(word, 0) >= awaited)

    def _answer(self, step: int, do: int, rows: int, compute_ns: int, wait_ns: int) -> None:
        payload = DONE.pack(step, 0, 0, compute_ns, wait_ns)
        regions = self._regions(do, rows) if self._remote else ()
        self._to_driver.send(Tag.DONE, payload, regions, _SEND_BOUND_S)
        self.steps += 1
        self.compute_ns += compute_ns
        self.wait_ns += wait_ns

    def _regions(self, do: int, rows: int) -> Regions:
        """Return what a driver on another box must see of the answer."""
        mine, tokens = self._mine, self._tokens
        counts: dict[str, int] = {}
        if do & Do.FRONT:
            n_experts = mine.scores_odd[0].size
            counts |= dict.fromkeys(("scores_even", "scores_odd"), tokens * n_experts)
            counts |= dict.fromkeys(("ahead_even", "ahead_odd"), n_experts)
        if do & Do.WHOLE:
            counts["chosen"] = mine.chosen_of(tokens).size
        if do & Do.GIVE:
            counts |= {"word": 1, "hidden": tokens * mine.hidden.shape[1]}
        if do & Do.LOGITS:
            counts["logits"] = rows * mine.logits.shape[1]
        if do & Do.LARGEST:
            counts |= {"best": 1, "best_logit": 1}
        return self._own.layout.regions(self._own.arena, **counts)

    def close(self) -> None:
        """Let go of what other processes map, too."""
        for arena in self._registered:
            self._model.runtime.unregister(arena)
