"""What a generation needs of the layer loop, wherever the layers are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fomoe.engine.brain import Brain
from fomoe.engine.recorder import Recorder
from fomoe.engine.sequences import Sequence
from fomoe.engine.waterfall import Stopwatch
from fomoe.model.buffers import F32
from fomoe.model.spec import ModelSpec
from fomoe.model.state import Batch, SequenceState
from fomoe.residency import LogicalCache


class Twin(Protocol):
    """A second state of a sequence, to try single tokens on."""

    @property
    def state(self) -> SequenceState:
        """What the trial's batch is made of."""

    def take(self) -> None:
        """Take the original's state as it is now."""

    def borrowed_row(self) -> AbstractContextManager[None]:
        """Leave the original as it was, whatever is tried inside."""


class LayerLoop(Protocol):
    """Runs batches through the model; one pass is under way at a time.

    Attributes:
        brain: chooses experts and counts what rules cost.
        watch: where the time of passes goes.
        recorder: gets the router's scores of every pass, where there is one.
    """

    brain: Brain
    watch: Stopwatch
    recorder: Recorder | None

    @property
    def spec(self) -> ModelSpec:
        """The model."""

    @property
    def expert_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of one expert of each layer, int64 [L]."""

    def follow(self, logical: LogicalCache | None) -> None:
        """Keep at hand what this cache takes as resident, as it changes; None: nothing."""

    def step(self, batch: Batch, sequences: tuple[Sequence, ...]) -> object:
        """Run one pass; sequences have advanced by their tokens."""

    def step_serial(self, batch: Batch, sequences: tuple[Sequence, ...]) -> object:
        """The same pass with nothing overlapped; gives the same bits."""

    def prefill(
        self, batch: Batch, sequences: tuple[Sequence, ...], on_layer: Callable[[int], None]
    ) -> object:
        """Run a chunk of a prompt; what `on_layer`, called after a layer, raises ends the pass."""

    def logits(self, rows: npt.NDArray[np.intp]) -> F32:
        """Return the logits [n, V] of some rows of the last pass, until the next call."""

    @property
    def has_twin(self) -> bool:
        """Whether there is room for a second state."""

    def twin(self, state: SequenceState) -> Twin:
        """Return a second state beside a sequence's."""

    def step_exactly(self, batch: Batch) -> npt.NDArray[np.int32]:
        """Run one token with the router's own choice, of which nobody is told.

        Returns:
            int32 [L, k], the experts of each layer.
        """
