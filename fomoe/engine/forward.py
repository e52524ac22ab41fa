"""The layer loop: one pass of a batch through all layers, overlapped, and its serial twin."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.engine.brain import Brain
from fomoe.engine.experts import ExpertHost
from fomoe.engine.sequences import Sequence
from fomoe.engine.waterfall import Lap, Stopwatch
from fomoe.model.buffers import F32
from fomoe.model.layers import DenseModel
from fomoe.model.state import Batch
from fomoe.residency import LogicalCache


def exact_cache(sequences: tuple[Sequence, ...]) -> LogicalCache | None:
    """Return the logical cache of a sequence that goes alone and exactly, else None."""
    alone = len(sequences) == 1 and sequences[0].exact and sequences[0].touched == 0.0
    return sequences[0].logical if alone else None


class Forward:
    """Runs batches through the model; where experts lie is the host's business."""

    def __init__(self, model: DenseModel, experts: ExpertHost, *, prefetch: bool) -> None:
        self.model = model
        self.experts = experts
        self.brain = Brain(model.spec.moe.top_k)
        self.watch = Stopwatch()
        self.prefetch = prefetch

    def step(self, batch: Batch, sequences: tuple[Sequence, ...]) -> F32:
        """Return the last residual stream [T, D]; sequences have advanced by their tokens.

        While the devices compute a layer's experts, the shared expert runs here and the next
        layer's probable experts are asked for. `finish` is the one place that can wait.
        """
        model, experts, watch = self.model, self.experts, self.watch
        decoding = all(sequence.decoding for sequence in sequences)
        plain = exact_cache(sequences)
        ahead = self.prefetch and decoding
        watch.start()
        x = model.embed(batch)
        for layer in range(model.spec.n_layers):
            model.mix(layer, x, batch)
            h, scores = model.scores(layer, x)
            watch.lap(Lap.DENSE)
            if plain is not None:
                experts.decide(layer, h, scores, plain, decoding=decoding)
            else:
                route = self.brain.route(layer, scores, batch, sequences)
                experts.begin(layer, h, route, decoding=decoding)
            watch.lap(Lap.BRAIN)
            shared = model.shared(layer, h)
            watch.lap(Lap.DENSE)
            if ahead and layer + 1 < model.spec.n_layers:
                experts.look_ahead(layer + 1, model.look_ahead(layer + 1, x))
                watch.lap(Lap.BRAIN)
            routed = experts.finish()
            watch.lap(Lap.AWAIT)
            model.close(x, routed, shared)
        batch.advance()
        return x

    def logits(self, x: F32, rows: npt.NDArray[np.intp]) -> F32:
        """Return the logits [n, V] of some rows of the last residual stream."""
        self.watch.start()
        logits = self.model.logits(x, rows)
        self.watch.lap(Lap.DENSE)
        return logits

    def step_serial(self, batch: Batch, sequences: tuple[Sequence, ...]) -> F32:
        """The same pass with nothing overlapped and nothing prefetched; gives the same bits."""
        model, experts, watch = self.model, self.experts, self.watch
        decoding = all(sequence.decoding for sequence in sequences)
        plain = exact_cache(sequences)
        watch.start()
        x = model.embed(batch)
        for layer in range(model.spec.n_layers):
            model.mix(layer, x, batch)
            h, scores = model.scores(layer, x)
            watch.lap(Lap.DENSE)
            if plain is not None:
                experts.decide(layer, h, scores, plain, decoding=decoding)
            else:
                route = self.brain.route(layer, scores, batch, sequences)
                experts.begin(layer, h, route, decoding=decoding)
            watch.lap(Lap.BRAIN)
            routed = experts.finish()
            watch.lap(Lap.AWAIT)
            model.close(x, routed, model.shared(layer, h))
        batch.advance()
        return x
