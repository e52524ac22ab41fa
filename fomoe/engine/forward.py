"""The layer loop: one pass of a batch through all layers, overlapped, and its serial twin."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fomoe.engine.brain import Brain
from fomoe.engine.experts import ExpertHost
from fomoe.engine.prefill import prefill
from fomoe.engine.recorder import Recorder
from fomoe.engine.sequences import Sequence
from fomoe.engine.waterfall import Lap, Stopwatch
from fomoe.model.buffers import F32
from fomoe.model.layers import DenseModel
from fomoe.model.spec import ModelSpec
from fomoe.model.state import Batch, SequenceState, TwinState
from fomoe.residency import LogicalCache
from fomoe.routing import route_exact


class Forward:
    """Runs batches through the model in this process; see `LayerLoop`.

    Where experts lie is the host's business.
    """

    def __init__(self, model: DenseModel, experts: ExpertHost, *, prefetch: bool) -> None:
        self.model = model
        self.experts = experts
        self.brain = Brain(model.spec.moe.top_k)
        self.watch = Stopwatch()
        self.prefetch = prefetch
        self.recorder: Recorder | None = None
        self._x: F32 = np.empty((0, model.spec.hidden), np.float32)

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.model.spec

    @property
    def expert_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of one expert of each layer, int64 [L]."""
        return self.experts.expert_bytes

    def follow(self, logical: LogicalCache | None) -> None:
        """Keep at hand what this cache takes as resident, as it changes; None: nothing."""
        self.experts.follow(logical)

    def step(self, batch: Batch, sequences: tuple[Sequence, ...]) -> F32:
        """Return the last residual stream [T, D]; sequences have advanced by their tokens.

        While the devices compute a layer's experts, the next layers' probable experts are asked
        for and the shared expert runs here. `finish` is the one place that can wait.
        """
        model, experts, watch = self.model, self.experts, self.watch
        recorder = self.recorder
        ahead = self.prefetch and all(sequence.decoding for sequence in sequences)
        watch.start()
        x = model.embed(batch)
        for layer in range(model.spec.n_layers):
            model.mix(layer, x, batch)
            h, scores = model.scores(layer, x)
            watch.lap(Lap.DENSE)
            self._begin(layer, h, scores, batch, sequences)
            if ahead:
                self._look_ahead(layer, x)
            if recorder is not None:
                recorder.take(layer, scores)
            watch.lap(Lap.BRAIN)
            shared = model.shared(layer, h)
            watch.lap(Lap.DENSE)
            routed = experts.finish()
            watch.lap(Lap.AWAIT)
            model.close(x, routed, shared)
        batch.advance()
        self._x = x
        return x

    def _begin(
        self, layer: int, h: F32, scores: F32, batch: Batch, sequences: tuple[Sequence, ...]
    ) -> None:
        """Choose the layer's experts and begin with them; one sequence alone takes one call."""
        experts, sequence = self.experts, sequences[0]
        decoding = all(one.decoding for one in sequences)
        alone = len(sequences) == 1 and sequence.touched == 0.0
        if alone and sequence.decider is None:
            experts.decide(layer, h, scores, sequence.logical, decoding=decoding)
        elif alone and sequence.decider is not None and decoding:
            experts.decide_by(layer, h, scores, sequence.decider, sequence.prices)
            self.brain.take(layer, sequence, sequence.decider.out)
        else:
            route = self.brain.route(layer, scores, batch, sequences)
            experts.begin(layer, h, route, decoding=decoding)
            for later in self.brain.later:
                experts.read_later(layer, later)

    def _look_ahead(self, layer: int, x: F32) -> None:
        """Let the next layers' routers say what they would choose for this residual stream."""
        experts, last = self.experts, self.model.spec.n_layers - 1 - layer
        for depth in range(1, min(experts.guess_depth, last) + 1):
            experts.look_ahead(layer + depth, self.model.look_ahead(layer + depth, x), depth)

    def prefill(
        self, batch: Batch, sequences: tuple[Sequence, ...], on_layer: Callable[[int], None]
    ) -> F32:
        """Run a chunk of a prompt, each expert read once; see `fomoe.engine.prefill`."""
        self._x = prefill(self, batch, sequences, on_layer)
        return self._x

    def logits(self, rows: npt.NDArray[np.intp]) -> F32:
        """Return the logits [n, V] of some rows of the last pass."""
        self.watch.start()
        logits = self.model.logits(self._x, rows)
        self.watch.lap(Lap.DENSE)
        return logits

    @property
    def has_twin(self) -> bool:
        """There is room for a second state, taken when it is wanted."""
        return True

    def twin(self, state: SequenceState) -> TwinState:
        """Return a second state beside a sequence's."""
        return TwinState(state)

    def step_exactly(self, batch: Batch) -> npt.NDArray[np.int32]:
        """Run one token with the router's own choice; returns it, int32 [L, k]."""
        model, experts, watch, top_k = self.model, self.experts, self.watch, self.spec.moe.top_k
        chosen = np.zeros((self.spec.n_layers, top_k), np.int32)
        watch.start()
        x = model.embed(batch)
        for layer in range(model.spec.n_layers):
            model.mix(layer, x, batch)
            h, scores = model.scores(layer, x)
            watch.lap(Lap.DENSE)
            route = route_exact(scores, top_k)
            chosen[layer] = route.ids[0]
            experts.begin(layer, h, route, decoding=True)
            watch.lap(Lap.BRAIN)
            routed = experts.finish()
            watch.lap(Lap.AWAIT)
            model.close(x, routed, model.shared(layer, h))
        self._x = x
        return chosen

    def step_serial(self, batch: Batch, sequences: tuple[Sequence, ...]) -> F32:
        """The same pass with nothing overlapped and nothing prefetched; gives the same bits."""
        model, experts, watch = self.model, self.experts, self.watch
        recorder = self.recorder
        watch.start()
        x = model.embed(batch)
        for layer in range(model.spec.n_layers):
            model.mix(layer, x, batch)
            h, scores = model.scores(layer, x)
            watch.lap(Lap.DENSE)
            self._begin(layer, h, scores, batch, sequences)
            if recorder is not None:
                recorder.take(layer, scores)
            watch.lap(Lap.BRAIN)
            routed = experts.finish()
            watch.lap(Lap.AWAIT)
            model.close(x, routed, model.shared(layer, h))
        batch.advance()
        self._x = x
        return x
