"""The layer loop where layers run on GPUs: it decides, and nothing else.

The twin of `Forward`. A layer is two halves: its *front* ends with the router's scores, its *back*
runs the chosen experts and closes the layer. `DeviceForward` waits in one place, for scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fomoe.engine.brain import Brain
from fomoe.engine.decisions import Decider
from fomoe.engine.recorder import Recorder
from fomoe.engine.sequences import Sequence
from fomoe.engine.waterfall import Lap, Stopwatch
from fomoe.errors import EngineError
from fomoe.model.buffers import F32
from fomoe.model.spec import ModelSpec
from fomoe.model.state import Batch, HostedState, SequenceState
from fomoe.residency import LogicalCache
from fomoe.routing import Route, route_exact

I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """Tokens that go through the layers together.

    Attributes:
        tokens: int32 [T].
        position: of the first one; at 0 the state begins empty.
        state: number of the sequence's state on the devices.
        overlap: whether devices may begin what nobody has asked for yet.
    """

    tokens: I32
    position: int
    state: int
    overlap: bool


class LayerHost(Protocol):
    """Hosts all layers on devices; one pass is under way at a time.

    A pass is `open`, then `scores` and one of `decide`, `decide_by` and `begin` for each layer in
    order, then `finish`; or `run_whole`, which is all of it. Every wait is bounded.
    """

    @property
    def expert_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of one expert of each layer, int64 [L]."""

    @property
    def runs_whole(self) -> bool:
        """Whether one device hosts every layer and holds every expert."""

    @property
    def n_states(self) -> int:
        """How many sequences' states the devices hold."""

    def follow(self, logical: LogicalCache | None) -> None:
        """Keep at hand what this cache takes as resident, as it changes; None: nothing."""

    def open(self, step: Pass) -> None:
        """Embed the tokens and begin the front of the first layer."""

    def scores(self, layer: int) -> F32:
        """Wait for the layer's front; its scores float32 [T, E] stand until the next wait."""

    def decide(self, layer: int, scores: F32, logical: LogicalCache) -> None:
        """Route one sequence's token exactly, tell its logical cache, and begin the back."""

    def decide_by(self, layer: int, scores: F32, decider: Decider, prices: F32 | None) -> None:
        """Let a rule choose for one sequence's token, and begin the back.

        `decider.out` has the choice; `prices` float32 [1] stands in for the rule's own.
        """

    def begin(self, layer: int, route: Route, *, decoding: bool, exact: bool) -> None:
        """Begin the back with a route that was made elsewhere; `exact`: it is the router's own.

        Devices may then weigh by their own softmax, whose bits are those of a whole pass.
        """

    def read_later(self, layer: int, experts: I32) -> None:
        """Load experts that were wanted and did not run, behind all demand; never waits."""

    def finish(self) -> None:
        """Wait for the last layer's back."""

    def run_whole(self, step: Pass, *, decoding: bool) -> I32:
        """Run all layers with the router's own choice; returns it, int32 [L, T, k]."""

    def logits(self, rows: npt.NDArray[np.intp]) -> F32:
        """Return the logits [n, V] of some rows of the last pass, until the next call."""

    def largest(self, row: int) -> tuple[int, float]:
        """Return id and value of the greatest logit of a row of the last pass."""

    def copy_state(self, to: int, origin: int, length: int) -> None:
        """Make state `to` what state `origin` is after `length` tokens."""


class DeviceForward:
    """Runs batches of one sequence through layers that devices host; see `LayerLoop`.

    With the router's own choice and every expert on the one device, a pass is one message: the
    device chooses by the router's rule and the driver tells the logical cache afterwards, whose
    hash comes out the same. A host that computes in this process charges that to `watch` itself.
    """

    def __init__(self, spec: ModelSpec, host: LayerHost, watch: Stopwatch | None = None) -> None:
        self.spec = spec
        self.host = host
        self.brain = Brain(spec.moe.top_k)
        self.watch = watch or Stopwatch()
        self.recorder: Recorder | None = None

    @property
    def expert_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of one expert of each layer, int64 [L]."""
        return self.host.expert_bytes

    def follow(self, logical: LogicalCache | None) -> None:
        """Keep at hand what this cache takes as resident, as it changes; None: nothing."""
        self.host.follow(logical)

    def step(self, batch: Batch, sequences: tuple[Sequence, ...]) -> None:
        """Run one pass; sequences have advanced by their tokens."""
        self._run(batch, sequences, _nothing)

    def prefill(
        self, batch: Batch, sequences: tuple[Sequence, ...], on_layer: Callable[[int], None]
    ) -> None:
        """Run a chunk of a prompt; what `on_layer`, called after a layer, raises ends the pass."""
        self._run(batch, sequences, on_layer)

    def step_serial(self, batch: Batch, sequences: tuple[Sequence, ...]) -> None:
        """The same pass, one half of a layer at a time; gives the same bits."""
        self._layers(batch, _one(sequences), _nothing, overlap=False)

    def _run(
        self, batch: Batch, sequences: tuple[Sequence, ...], on_layer: Callable[[int], None]
    ) -> None:
        sequence = _one(sequences)
        untouched = sequence.exact and sequence.touched == 0.0
        if self.host.runs_whole and untouched and self.recorder is None:
            self._whole(batch, sequence)
            on_layer(self.spec.n_layers - 1)
        else:
            self._layers(batch, sequence, on_layer, overlap=True)

    def _layers(
        self, batch: Batch, sequence: Sequence, on_layer: Callable[[int], None], *, overlap: bool
    ) -> None:
        """Decide layer by layer; while a device computes, the driver does its bookkeeping."""
        host, watch = self.host, self.watch
        watch.start()
        host.open(_pass_of(batch, overlap=overlap))
        for layer in range(self.spec.n_layers):
            scores = host.scores(layer)
            watch.lap(Lap.AWAIT)
            self._begin(layer, scores, batch, sequence)
            if self.recorder is not None:
                self.recorder.take(layer, scores)
            watch.lap(Lap.BRAIN)
            on_layer(layer)
        host.finish()
        watch.lap(Lap.AWAIT)
        batch.advance()

    def _begin(self, layer: int, scores: F32, batch: Batch, sequence: Sequence) -> None:
        """Choose the layer's experts and begin with them; a token takes one call."""
        host, decider = self.host, sequence.decider
        alone = sequence.decoding and batch.size == 1 and sequence.touched == 0.0
        if alone and decider is None:
            host.decide(layer, scores, sequence.logical)
        elif alone and decider is not None:
            host.decide_by(layer, scores, decider, sequence.prices)
            self.brain.take(layer, sequence, decider.out)
        else:
            route = self.brain.route(layer, scores, batch, (sequence,))
            touched = sequence.decoding and sequence.touched > 0.0
            exact = not touched and (decider is None or not sequence.decoding)
            host.begin(layer, route, decoding=sequence.decoding, exact=exact)
            for later in self.brain.later:
                host.read_later(layer, later)

    def _whole(self, batch: Batch, sequence: Sequence) -> None:
        watch = self.watch
        watch.start()
        chosen = self.host.run_whole(_pass_of(batch), decoding=sequence.decoding)
        watch.lap(Lap.AWAIT)
        for layer, ids in enumerate(chosen):
            sequence.logical.observe(layer, ids)
        watch.lap(Lap.BRAIN)
        batch.advance()

    def logits(self, rows: npt.NDArray[np.intp]) -> F32:
        """Return the logits [n, V] of some rows of the last pass, until the next call."""
        self.watch.start()
        logits = self.host.logits(rows)
        self.watch.lap(Lap.AWAIT)
        return logits

    def largest(self, row: int) -> tuple[int, float]:
        """Return id and value of the greatest logit of a row of the last pass."""
        self.watch.start()
        found = self.host.largest(row)
        self.watch.lap(Lap.AWAIT)
        return found

    @property
    def has_twin(self) -> bool:
        """Whether the devices hold a second state."""
        return self.host.n_states > 1

    def twin(self, state: SequenceState) -> HostedTwin:
        """Return a second state beside a sequence's."""
        assert isinstance(state, HostedState)
        return HostedTwin(self.host, state)

    def step_exactly(self, batch: Batch) -> I32:
        """Run one token with the router's own choice; returns it, int32 [L, k]."""
        host, watch, top_k = self.host, self.watch, self.spec.moe.top_k
        watch.start()
        if host.runs_whole:
            chosen = host.run_whole(_pass_of(batch), decoding=True)[:, 0].copy()
            watch.lap(Lap.AWAIT)
            return chosen
        chosen = np.zeros((self.spec.n_layers, top_k), np.int32)
        host.open(_pass_of(batch))
        for layer in range(self.spec.n_layers):
            scores = host.scores(layer)
            watch.lap(Lap.AWAIT)
            route = route_exact(scores, top_k)
            chosen[layer] = route.ids[0]
            host.begin(layer, route, decoding=True, exact=True)
            watch.lap(Lap.BRAIN)
        host.finish()
        watch.lap(Lap.AWAIT)
        return chosen


class HostedTwin:
    """A second state on the devices; see `Twin`."""

    def __init__(self, host: LayerHost, original: HostedState) -> None:
        self.state = HostedState(original.ctx_size, original.number + 1)
        self._host = host
        self._original = original

    def take(self) -> None:
        """Take the original's state as it is now."""
        length = self.state.length = self._original.length
        self._host.copy_state(self.state.number, self._original.number, length)

    @contextmanager
    def borrowed_row(self) -> Iterator[None]:
        """Nothing is borrowed: keys and values are the twin's own, too."""
        yield


def _pass_of(batch: Batch, *, overlap: bool = True) -> Pass:
    state = batch.runs[0].state
    assert isinstance(state, HostedState)
    return Pass(batch.tokens, batch.runs[0].position, state.number, overlap)


def _one(sequences: tuple[Sequence, ...]) -> Sequence:
    if len(sequences) != 1:
        raise EngineError(f"{len(sequences)} sequences in a pass: devices host one at a time")
    return sequences[0]


def _nothing(layer: int) -> None:
    """Nobody watches."""
