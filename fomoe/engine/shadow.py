"""A decode step's exact twin: what the routing's savings cost, measured on one token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.engine.loop import LayerLoop
from fomoe.engine.sequences import Sequence
from fomoe.evaluation.divergence import kl_of_logs, log_softmax
from fomoe.model.buffers import F32
from fomoe.model.state import Batch
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

    def __init__(self, loop: LayerLoop, sequence: Sequence) -> None:
        self._loop = loop
        self._sequence = sequence
        self._twin = loop.twin(sequence.state)

    def take(self) -> None:
        """Copy the state from which the next step starts."""
        self._twin.take()

    def repeat(self, token: int) -> tuple[F32, npt.NDArray[np.int64]]:
        """Run the step of `token` exactly.

        Returns:
            Its logits float32 [V], a view that the next pass overwrites; and int64 [L], its
            experts of each layer that are not logically resident.
        """
        with self._twin.borrowed_row():
            chosen = self._loop.step_exactly(Batch.of([(self._twin.state, [token])]))
            logits: F32 = self._loop.logits(_LAST)[0]
        resident = np.take_along_axis(self._sequence.logical.caches.resident[0], chosen, axis=1)
        return logits, np.count_nonzero(~resident, axis=1)


def divergence(exact: F32, other: F32) -> int:
    """Return KL(exact, other) of two rows of logits [V] in whole nanonats, in float64.

    Rounding to nanonats makes what a controller hears a count.
    """
    return round(float(kl_of_logs(log_softmax(exact), log_softmax(other))) * NANO)
