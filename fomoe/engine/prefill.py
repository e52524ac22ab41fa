"""A chunk of a prompt through all layers, each expert read once, and how far it has come."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fomoe.engine.forward import Forward
from fomoe.engine.sequences import Sequence
from fomoe.engine.waterfall import Lap
from fomoe.model.buffers import F32
from fomoe.model.state import Batch

GUESS_ROWS = 256  # tokens of a chunk that tell what the next layer will want


def prefill(
    forward: Forward, batch: Batch, sequences: tuple[Sequence, ...],
    on_layer: Callable[[int], None],
) -> F32:  # fmt: skip
    """Return the last residual stream [T, D]; sequences have advanced by their tokens.

    While the devices stream a layer's experts, the shared expert runs here, and the experts that
    the next layer will probably want are asked for: they are read while its dense part computes.
    `on_layer` is called after each layer; what it raises ends the pass, whose sequences are then
    to be reset.
    """
    model, experts, watch = forward.model, forward.experts, forward.watch
    watch.start()
    x = model.embed(batch)
    for layer in range(model.spec.n_layers):
        following = layer + 1
        model.mix(layer, x, batch)
        h, scores = model.scores(layer, x)
        watch.lap(Lap.DENSE)
        route = forward.brain.route(layer, scores, batch, sequences)
        experts.begin(layer, h, route, decoding=False)
        if following < model.spec.n_layers and forward.prefetch and experts.may_guess(following):
            experts.look_ahead(following, model.look_ahead(following, _sample(x)))
        watch.lap(Lap.BRAIN)
        shared = model.shared(layer, h)
        watch.lap(Lap.DENSE)
        routed = experts.finish()
        watch.lap(Lap.AWAIT)
        model.close(x, routed, shared)
        on_layer(layer)
    batch.advance()
    return x


def _sample(x: F32) -> F32:
    """Return up to `GUESS_ROWS` rows of `x`, spread over all of it."""
    step = -(-len(x) // GUESS_ROWS)
    return x if step == 1 else np.ascontiguousarray(x[::step])
