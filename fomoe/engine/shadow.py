"""A decode step's exact twin: what the routing's savings cost, measured on one token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.engine.forward import Forward
from fomoe.engine.sequences import Sequence
from fomoe.engine.waterfall import Lap
from fomoe.evaluation.divergence import kl_of_logs, log_softmax
from fomoe.model.buffers import F32
from fomoe.model.state import Batch, TwinState
from fomoe.routing import route_exact
from fomoe.routing.price import NANO

_LAST = np.array([0])


class Shadow:
    """Repeats single decode steps of a sequence exactly; the sequence does not learn of it.

    `take` before the step, `repeat` after it. Recurrent memory is the twin's own, the keys and
    values that the twin writes are taken back, and no logical cache, hash or trace is told. The
    experts that it reads come into the tiers like any other, and what watches times and reads to
    guess ahead watches them, too: they may change speed only.
    The twin comes second, so that it is charged for what the step itself did not read.
    """

    def __init__(self, forward: Forward, sequence: Sequence) -> None:
        self._forward = forward
        self._sequence = sequence
        self._twin = TwinState(sequence.state)

    def take(self) -> None:
        """Copy the state from which the next step starts."""
        self._twin.take()

    def repeat(self, token: int) -> tuple[F32, npt.NDArray[np.int64]]:
        """Run the step of `token` exactly.

        Returns:
            Its logits float32 [V], a view that the next pass overwrites; and int64 [L], its
            experts of each layer that are not logically resident.
        """
        model, experts, watch = self._forward.model, self._forward.experts, self._forward.watch
        logical, top_k = self._sequence.logical, model.spec.moe.top_k
        missing = np.zeros(model.spec.n_layers, np.int64)
        batch = Batch.of([(self._twin, [token])])
        watch.start()
        with self._twin.borrowed_row():
            x = model.embed(batch)
            for layer in range(model.spec.n_layers):
                model.mix(layer, x, batch)
                h, scores = model.scores(layer, x)
                watch.lap(Lap.DENSE)
                route = route_exact(scores, top_k)
                missing[layer] = np.count_nonzero(~logical.mask(layer)[route.ids])
                experts.begin(layer, h, route, decoding=True)
                watch.lap(Lap.BRAIN)
                routed = experts.finish()
                watch.lap(Lap.AWAIT)
                model.close(x, routed, model.shared(layer, h))
        logits: F32 = self._forward.logits(x, _LAST)[0]
        return logits, missing


def divergence(exact: F32, other: F32) -> int:
    """Return KL(exact, other) of two rows of logits [V] in whole nanonats, in float64.

    Rounding to nanonats makes what a controller hears a count.
    """
    return round(float(kl_of_logs(log_softmax(exact), log_softmax(other))) * NANO)
