"""A chunk of a prompt through all layers, each expert read once, and how far it has come."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fomoe.engine.sequences import Sequence
from fomoe.engine.waterfall import Lap
from fomoe.model.buffers import F32
from fomoe.model.state import Batch

if TYPE_CHECKING:
    from fomoe.engine.forward import Forward

GUESS_ROWS = 256  # tokens of a chunk that tell what the next layers will want
LAYERS_AHEAD = 2  # where layers alternate between two sizes of slots, both kinds are read ahead


def prefill(
    forward: Forward, batch: Batch, sequences: tuple[Sequence, ...],
    on_layer: Callable[[int], None],
) -> F32:  # fmt: skip
    """Return the last residual stream [T, D]; sequences have advanced by their tokens.

    While the devices stream a layer's experts, the shared expert runs here, and the experts that
    the next layers will probably want are asked for: they are read while dense parts compute.
    `on_layer` is called after each layer; what it raises ends the pass, whose sequences are then
    to be reset.
    """
    model, experts, watch = forward.model, forward.experts, forward.watch
    watch.start()
    x = model.embed(batch)
    experts.open_prompt(batch.size)
    if forward.prefetch:
        _look_ahead(forward, -1, x)
    for layer in range(model.spec.n_layers):
        model.mix(layer, x, batch)
        h, scores = model.scores(layer, x)
        watch.lap(Lap.DENSE)
        route = forward.brain.route(layer, scores, batch, sequences)
        experts.begin(layer, h, route, decoding=False)
        if forward.recorder is not None:
            forward.recorder.take(layer, scores)
        if forward.prefetch:
            _look_ahead(forward, layer, x)
        watch.lap(Lap.BRAIN)
        shared = model.shared(layer, h)
        watch.lap(Lap.DENSE)
        routed = experts.finish()
        watch.lap(Lap.AWAIT)
        model.close(x, routed, shared)
        on_layer(layer)
    batch.advance()
    return x


def _look_ahead(forward: Forward, layer: int, x: F32) -> None:
    """Ask for what the next layers will want, as far as there are slots to read it into."""
    sample = None
    for following in range(layer + 1, min(layer + 1 + LAYERS_AHEAD, forward.model.spec.n_layers)):
        if forward.experts.may_guess(following):
            sample = _sample(x) if sample is None else sample
            forward.experts.look_ahead(following, forward.model.look_ahead(following, sample))


def _sample(x: F32) -> F32:
    """Return up to `GUESS_ROWS` rows of `x`, spread over all of it."""
    step = -(-len(x) // GUESS_ROWS)
    return x if step == 1 else np.ascontiguousarray(x[::step])
