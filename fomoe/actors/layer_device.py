"""Serves halves of layers on one device: what the driver asks for, in the order of `Do`."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Fabric, Regions, Sender, load_acquire_u64, store_release_u64
from fomoe.actors.expert_copies import ExpertCopies
from fomoe.actors.layer_layout import LayerViews, Neighbour
from fomoe.actors.layer_model import LayerModel
from fomoe.actors.messages import DONE, FORESEEN, LAYERS, STEP_ID, Do, Tag
from fomoe.actors.names import ARM_NODE, storage_name
from fomoe.engine.copies import COPY
from fomoe.engine.transfers import ENTRY
from fomoe.errors import DeviceError

U64 = npt.NDArray[np.uint64]
Routes = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]

_SPIN_US = 1000.0  # while a token is in flight: as long as a layer may take elsewhere
_WAIT_MS = 20.0
_SEND_BOUND_S = 5.0
_BOUND_S = 120.0
_HALVES, _OPENING = Do.BACK | Do.FRONT, Do.BEGIN | Do.EMBED | Do.FRONT
_WITH_ARM = Do.PART | Do.INPUT  # which no joined graph has
_ENDS = Do.GIVE | Do.LOGITS | Do.LARGEST  # what waits for the device's work


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
        bases = [model.runtime.register(arena) for arena in self._registered]
        layouts = zip(bases, (d.layout for d in self._devices), strict=True)
        self._hidden = [base + layout.start("hidden") for base, layout in layouts]
        self._own_hidden = self._hidden[number]  # as the device sees it, like all of these
        self._sum = bases[number] + self._own.layout.start("sum")
        places = self._mine.places(self._own_hidden - self._mine.hidden.ctypes.data)
        if places is not None:
            model.lend(places)
        self._to_driver: Sender = fabric.sender("driver")
        self._computed = model.runtime.event()
        self._tokens = 1
        self._aborted = 0  # steps up to this one were given up
        self._waited = self._idle = 0  # for bytes, and for what other processes give
        self._has_hits = False  # of the back that a message asks for, these have been begun with
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
        started, self._waited, self._idle = time.perf_counter_ns(), 0, 0
        if do & Do.COPY_STATE:
            model.copy_state(state, peer, position)
        if do & Do.BEGIN:
            self._begin(do, tokens, position, state)
        if do & Do.EMBED and not _as_one(do, tokens, _OPENING):
            model.embed()
        self._has_hits = bool(n_copies) and self._begin_hits(do, layer, step)
        is_here = self._bring(step) if n_copies else True
        if is_here and do & Do.TAKE:
            is_here = self._await_hidden(peer, awaited, step)
        if not is_here or not self._run(do, layer, peer, message):
            self._give_up(step)
            return
        if self._moves and do & _ENDS:
            self._watch_loads(step)
        self._give(do, step, peer, rows)
        if self._moves:
            self._close(step, do)
        took = time.perf_counter_ns() - started - self._waited - self._idle
        self._answer(step, do, rows, took, self._waited)

    def _give(self, do: int, step: int, peer: int, rows: int) -> None:
        """Hand over the residual stream, or what the head makes of it."""
        model = self._model
        if do & Do.GIVE:
            model.take_hidden(self._own_hidden)
            store_release_u64(self._mine.word, 0, step)
            if self._devices[peer] is not self._own:  # else the answer tells the driver
                self._fabric.ring(self._devices[peer].name)
            self._foresee()
        if do & Do.LOGITS:
            np.copyto(self._mine.logits[:rows], model.logits(self._mine.rows[:rows]))
        if do & Do.LARGEST:
            self._mine.best[0], self._mine.best_logit[0], _ = model.largest(int(self._mine.rows[0]))

    def _begin_hits(self, do: int, layer: int, step: int) -> bool:
        """Begin a token's back with the experts that are there; False where that is not to be.

        Late ones change nothing of what the others come to.
        """
        if self._tokens > 1 or not do & Do.BACK or do & Do.PART:
            return False
        late = self._copies.late(step, self._mine.ids[0])
        if late.all() or not late.any():
            return False
        routes = self._routes(do, layer)
        self._model.back_hits(layer, routes, late)
        self._model.runtime.record(self._computed, self._model.stream)
        return True

    def _bring(self, step: int) -> bool:
        """Let the compute stream wait for a step's copies; False where they will never come."""
        copies = self._copies
        if not copies.has_begun(step):
            self._waited += self._wait(
                lambda: copies.has_begun(step) or step <= self._aborted, "an expert's bytes"
            )
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
            self._waited += self._wait(lambda: copies.has_ended(step), "a copy")

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
        self._finish_computing()
        copies.abort(step)
        self._wait(lambda: copies.has_ended(step), "a copy")
        self._to_driver.send(Tag.DONE, DONE.pack(step, 1, 0, 0, 0), (), _SEND_BOUND_S)

    def _wait(self, ready: Callable[[], bool], what: str, *, nap: bool = True) -> int:
        """Bring copies on their way, and hear what comes, until `ready`.

        Returns the nanoseconds in which no hits were computed meanwhile.

        Raises:
            DeviceError: it is not after two minutes.
        """
        started = idle = time.perf_counter_ns()
        is_idle = not self._has_hits
        while True:
            bell = self._fabric.bell()
            if not is_idle:  # while hits are computed nobody waits
                is_idle = self._model.runtime.done(self._computed)
                idle = time.perf_counter_ns()
            if ready():
                break
            self._copies.advance()
            self._listen()
            self._foresee()
            if time.perf_counter_ns() - started > _BOUND_S * 1e9:
                raise DeviceError(f"{what} has not come within {_BOUND_S:.0f} s")
            if nap and not self._copies.under_way and not ready():
                self._fabric.wait(bell, _SPIN_US, _WAIT_MS)
        return time.perf_counter_ns() - idle

    def _begin(self, do: int, tokens: int, position: int, state: int) -> None:
        model, ids = self._model, self._mine.tokens[:tokens]
        self._tokens = tokens
        if position == 0:
            model.reset(state)
        if do & Do.WHOLE:
            np.copyto(self._mine.chosen_of(tokens), model.prefill(ids, position, state))
        elif _as_one(do, tokens, _OPENING):
            model.begin_and_front(ids, position, state)
        else:
            model.begin(ids, position, state)

    def _run(self, do: int, layer: int, peer: int, message: bytes | bytearray) -> bool:
        """Compute what a message asks for; False where storage's part of it will never come."""
        if do & Do.TAKE:
            self._model.put_hidden(self._hidden[peer])
        if do & Do.GATHER:
            self._model.gather(layer)
        if do & Do.WAVE:
            self._run_wave(layer, message)
        if do & Do.COMBINE:
            self._model.combine(layer)
            layer += 1
        if do & Do.BACK:
            if not do & Do.PART:
                self._run_back(do, layer)
            elif not self._run_part(layer, *STEP_ID.unpack_from(message)):
                return False
            layer += 1
        if do & Do.FRONT:
            self._run_front(layer, do)
        return True

    def _run_back(self, do: int, layer: int) -> None:
        """Close a layer; a token's goes on to the scores of the next, where those are wanted."""
        model = self._model
        if self._has_hits:
            self._copies.publish(layer)
            model.back_late(layer)
            return
        routes = self._routes(do, layer)
        if _as_one(do, self._tokens, _HALVES):
            model.back_and_front(layer, routes)
        elif routes is None:
            model.own_back(layer)
        else:
            model.back(layer, *routes)

    def _routes(self, do: int, layer: int) -> Routes | None:
        """Return what the driver has decided; None where the device chooses, by its own table."""
        mine, tokens = self._mine, self._tokens
        if not do & Do.CHOOSE:
            return mine.ids[:tokens], mine.weights[:tokens]
        self._copies.publish(layer)
        return None

    def _run_part(self, layer: int, step: int) -> bool:
        """Run this device's part of a token's experts and add storage's, see `layer_arm`."""
        mine = self._mine
        count = int(np.count_nonzero(mine.ids[0] >= 0))
        self._model.back(layer, mine.ids[:1, :count], mine.weights[:1, :count])
        if not self._await_word(mine.sum_word, step, step, storage_name(ARM_NODE)):
            return False
        self._model.add(self._sum)
        return True

    def _run_wave(self, layer: int, message: bytes | bytearray) -> None:
        *_, n_copies, n_entries = LAYERS.unpack_from(message)
        at = LAYERS.size + n_copies * COPY.itemsize
        entries = np.frombuffer(message, ENTRY, n_entries, at)
        self._model.wave(layer, entries["expert"].copy(), entries["slot"].copy())
        self._finish_computing()

    def _run_front(self, layer: int, do: int) -> None:
        model, mine, tokens = self._model, self._mine, self._tokens
        gives_input = bool(do & Do.INPUT) and tokens == 1
        is_queued = _as_one(do, tokens, _HALVES) and not self._has_hits
        if not is_queued and not _as_one(do, tokens, _OPENING):
            model.front(layer, gives_input=gives_input)
        if self._moves:  # what comes for later steps is not to wait for this one
            self._finish_computing()
        np.copyto(mine.scores_of(layer)[:tokens], model.scores(layer))
        if (ahead := model.ahead()) is not None:
            np.copyto(mine.ahead_of(layer), ahead)
        if gives_input:
            np.copyto(mine.input, model.input())

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
        return self._await_word(self._views[peer].word, awaited, step, self._devices[peer].name)

    def _await_word(self, word: U64, awaited: int, step: int, name: str) -> bool:
        """Wait for what another process gives with a word, as `_await_hidden`."""
        if load_acquire_u64(word, 0) >= awaited:
            return True

        def is_over() -> bool:
            given = load_acquire_u64(word, 0) >= awaited
            return given or step <= self._aborted or self._fabric.peer_dead(name)

        self._idle += self._wait(is_over, f"what {name} gives")
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


def _as_one(do: int, tokens: int, parts: int) -> bool:
    """Whether these parts of a token's pass are asked for, all of them, and queued as one."""
    return tokens == 1 and do & parts == parts and not do & _WITH_ARM
