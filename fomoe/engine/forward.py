"""The layer loop: one pass of a batch through all layers, overlapped, and its serial twin."""

from __future__ import annotations

from fomoe.engine.brain import Brain
from fomoe.engine.experts import ExpertHost
from fomoe.engine.sequences import Sequence
from fomoe.model.buffers import F32
from fomoe.model.layers import DenseModel
from fomoe.model.state import Batch


class Forward:
    """Runs batches through the model; where experts lie is the host's business."""

    def __init__(self, model: DenseModel, experts: ExpertHost, *, prefetch: bool) -> None:
        self.model = model
        self.experts = experts
        self.brain = Brain(model.spec.moe.top_k)
        self.prefetch = prefetch

    def step(self, batch: Batch, sequences: tuple[Sequence, ...]) -> F32:
        """Return the last residual stream [T, D]; sequences have advanced by their tokens.

        While the devices compute a layer's experts, the shared expert runs here and the next
        layer's probable experts are asked for. `finish` is the one place that can wait.
        """
        model, experts = self.model, self.experts
        decoding = all(sequence.decoding for sequence in sequences)
        ahead = self.prefetch and decoding
        x = model.embed(batch)
        for layer in range(model.spec.n_layers):
            model.mix(layer, x, batch)
            h, scores = model.scores(layer, x)
            route = self.brain.route(layer, scores, batch, sequences)
            experts.begin(layer, h, route, decoding=decoding)
            shared = model.shared(layer, h)
            if ahead and layer + 1 < model.spec.n_layers:
                experts.look_ahead(layer + 1, model.look_ahead(layer + 1, x))
            model.close(x, experts.finish(), shared)
        batch.advance()
        return x

    def step_serial(self, batch: Batch, sequences: tuple[Sequence, ...]) -> F32:
        """The same pass with nothing overlapped and nothing prefetched; gives the same bits."""
        model, experts = self.model, self.experts
        decoding = all(sequence.decoding for sequence in sequences)
        x = model.embed(batch)
        for layer in range(model.spec.n_layers):
            model.mix(layer, x, batch)
            h, scores = model.scores(layer, x)
            route = self.brain.route(layer, scores, batch, sequences)
            experts.begin(layer, h, route, decoding=decoding)
            routed = experts.finish()
            model.close(x, routed, model.shared(layer, h))
        batch.advance()
        return x
