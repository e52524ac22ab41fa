"""Routing of one layer for a batch: exact for prompts, by a sequence's rule in its decode steps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.engine.decisions import Decisions
from fomoe.engine.meter import LossCounters
from fomoe.engine.sequences import Sequence
from fomoe.model.buffers import F32
from fomoe.model.state import Batch
from fomoe.routing import Route, route_exact
from fomoe.routing.nulls import round_to_bf16, touched_sites
from fomoe.routing.router import softmax

_Ids = npt.NDArray[np.int32]


class Brain:
    """Turns router scores into experts and weights; reads logical state only.

    Attributes:
        loss: what rules cost so far.
        later: experts int32 [n] of the layer routed last that rules ask to be read in the
            background.
    """

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self.loss = LossCounters()
        self.later: list[_Ids] = []

    def route(
        self, layer: int, scores: F32, batch: Batch, sequences: tuple[Sequence, ...]
    ) -> Route:
        """Return experts and weights [T, k]; each sequence's logical cache learns of them."""
        route = route_exact(scores, self._top_k)
        self.later.clear()
        for run, sequence in zip(batch.runs, sequences, strict=True):
            rows = slice(run.start, run.stop)
            if sequence.decider is None:
                sequence.logical.observe(layer, route.ids[rows])
            elif sequence.decoding:
                self._decide(layer, scores, rows, sequence, route)
            else:
                weighs = sequence.logical.caches.rules.eviction == "mass"
                p = softmax(scores[rows]) if weighs else None
                sequence.logical.commit(layer, route.ids[rows], p)
            if sequence.touched > 0.0 and sequence.decoding:
                touched = touched_sites(scores[rows], self._top_k, sequence.touched)
                weights = route.weights[rows]
                weights[touched] = round_to_bf16(weights[touched])
                sequence.lossy = True
        return route

    def _decide(
        self, layer: int, scores: F32, rows: slice, sequence: Sequence, route: Route
    ) -> None:
        assert sequence.decider is not None
        made = sequence.decider.decide(layer, scores[rows], prices=sequence.prices)
        background = self.take(layer, sequence, made)
        if background:
            self.later.append(made.background[0, :background])
        route.ids[rows] = made.ids
        route.weights[rows] = made.weights
        route.substituted[rows] = made.substituted

    def take(self, layer: int, sequence: Sequence, made: Decisions) -> int:
        """Count a sequence's decision; returns its background reads."""
        read, background, substituted = made.tally[0].tolist()
        sequence.reads[layer] = read + background
        if sequence.prices is not None:  # the decision hash has them, whatever they did
            sequence.lossy = True
        if substituted:
            sequence.lossy = True
            self.loss.substituted += substituted
            self.loss.lost_mass += float(made.lost[0])
        return int(background)
