"""Reads ahead of the router: which misses were guessed, and when the drives have time for them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fomoe.sim.lanes import F64, Drives, Landing
from fomoe.sim.loads import Counts
from fomoe.sim.schedule import Schedule

Whole = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class _Ahead:
    """What was read of one device's part of a layer: right and wrong guesses, float64 [lanes]."""

    right: F64
    wrong: F64
    landings: list[Landing] = field(default_factory=list)


class Guesses:
    """Draws which misses are guessed, and reads them ahead.

    What was guessed far ahead is guessed nearer as well. A guess starts only while a drive has
    nothing better to do before the router has spoken; a wrong one that has begun is read to its
    end.

    Args:
        nvme: int16 [lanes, L, D], experts that only the drives have.
        ram: the same of those that RAM has; a guess copies them early.
        schedule: recall, waste and how far ahead.
        rng: of the draws.

    Attributes:
        ram: int64 [lanes, L, D], experts in RAM that were guessed.
        wasted: float64 [lanes], bytes of wrong guesses.
    """

    def __init__(
        self, nvme: Counts, ram: Counts, schedule: Schedule, rng: np.random.Generator
    ) -> None:
        recall, right = schedule.recall, nvme.astype(np.int64)
        self._schedule = schedule
        self._right: list[Whole] = []
        for _ in range(schedule.depth):
            right = rng.binomial(right, recall)
            self._right.append(right)
            recall = schedule.decay
        self._wrong: Whole = rng.poisson(schedule.waste * self._right[0])
        self.ram: Whole = rng.binomial(ram, schedule.recall)
        self.wasted = np.zeros(len(nvme))
        self._ahead: dict[tuple[int, int], _Ahead] = {}

    def targets(self, layer: int) -> range:
        """Return the layers that are read ahead while this one's router is awaited, nearest first.

        None before the first router has spoken, and none where jobs do not overlap.
        """
        schedule, n_layers = self._schedule, self.ram.shape[1]
        if layer == 0 or schedule.recall == 0 or not schedule.overlap:
            return range(0)
        return range(layer, min(layer + schedule.depth, n_layers))

    def read(
        self, place: tuple[int, int], further: int, drives: Drives, window: tuple[F64, F64],
        nbytes: float,
    ) -> None:  # fmt: skip
        """Read guesses of a layer on a device.

        Args:
            place: layer and device.
            further: layers between that layer and the one whose router is awaited.
            drives: of the device's node.
            window: when the last router spoke and when the next one will, float64 [lanes] each.
            nbytes: of one expert.
        """
        (layer, device), (since, until) = place, window
        limit, errors = self._right[further][:, layer, device], self._wrong[:, layer, device]
        lanes = len(limit)
        got = self._ahead.setdefault(place, _Ahead(np.zeros(lanes), np.zeros(lanes)))
        for _ in range(int((limit + errors).max(initial=0))):
            goes = (got.right < limit) | (got.wrong < errors)
            goes &= drives.next_start(since) < until
            if not goes.any():
                break
            # Wrong ones come evenly among the right ones.
            errs = goes & (got.wrong < errors)
            errs &= (got.wrong * limit <= got.right * errors) | (got.right >= limit)
            end = drives.read(since, nbytes, self._schedule.pieces, goes)
            got.landings.append(Landing(end, goes & ~errs))
            got.right, got.wrong = got.right + (goes & ~errs), got.wrong + errs
            self.wasted += errs * nbytes

    def landings(self, layer: int, device: int) -> list[Landing]:
        """Return the right guesses of a layer on a device that were read or are under way."""
        ahead = self._ahead.get((layer, device))
        return [] if ahead is None else ahead.landings
