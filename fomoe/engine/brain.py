"""Routing of one layer for a batch: exact for prompts, cache-aware where a sequence asks for it."""

from __future__ import annotations

import numpy as np

from fomoe.engine.meter import LossCounters
from fomoe.engine.sequences import Sequence
from fomoe.model.buffers import F32
from fomoe.model.state import Batch
from fomoe.routing import Route, route_exact
from fomoe.routing.nulls import round_to_bf16, touched_sites


class Brain:
    """Turns router scores into experts and weights; reads logical state only."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self.loss = LossCounters()

    def route(
        self, layer: int, scores: F32, batch: Batch, sequences: tuple[Sequence, ...]
    ) -> Route:
        """Return experts and weights [T, k]; each sequence's logical cache learns of them."""
        route = route_exact(scores, self._top_k)
        for run, sequence in zip(batch.runs, sequences, strict=True):
            rows = slice(run.start, run.stop)
            if sequence.decider is None:
                sequence.logical.observe(layer, route.ids[rows])
            elif sequence.decoding:
                self._decide(layer, scores, rows, sequence, route)
            else:
                sequence.logical.commit(layer, route.ids[rows])
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
        background = np.count_nonzero(made.background >= 0)
        sequence.reads[layer] = np.count_nonzero(made.read) + background
        changed = int(np.count_nonzero(made.substituted))
        if changed:
            sequence.lossy = True
            self.loss.substituted += changed
            self.loss.lost_mass += float(made.lost.sum())
        route.ids[rows] = made.ids
        route.weights[rows] = made.weights
        route.substituted[rows] = made.substituted
