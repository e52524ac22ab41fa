"""Eviction policies: what a resident expert is worth, from counts of past use."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt


class History:
    """Integer counters of past use: `uses` and `last` (step of last use, -1 never), int64 [L, E].

    `steps` int64 [L] is each layer's present step. A step is a layer's own plan count, a token
    clock; all experts of a plan share it.
    """

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self.uses = np.zeros((n_layers, n_experts), dtype=np.int64)
        self.last = np.full((n_layers, n_experts), -1, dtype=np.int64)
        self.steps = np.zeros(n_layers, dtype=np.int64)

    def touch(self, layer: int, experts: npt.NDArray[np.int32] | int, step: int) -> None:
        """Count one use at `step`; experts are distinct."""
        self.uses[layer, experts] += 1
        self.last[layer, experts] = step


class EvictionPolicy(ABC):
    """Ranks experts by worth; the least worthy leaves first, at equal worth the lower id.

    `native_rule` names a rule of the native module that gives the same values; where it is None,
    as in policies that the module does not know, `values` is called instead.
    """

    @property
    def native_rule(self) -> str | None:
        """Return the name of the native rule, if there is one."""
        return _NATIVE.get(type(self))

    @abstractmethod
    def values(
        self, uses: npt.NDArray[np.int64], last: npt.NDArray[np.int64], step: int
    ) -> npt.NDArray[np.float64]:
        """Return the worth of each expert, float64 of the shape of `uses` and `last`.

        Both are as in `History`, any shape; `step` >= every `last`. Greater stays longer. Must be
        a function of these integers alone, with operations that IEEE 754 rounds correctly.
        """


class LRU(EvictionPolicy):
    """Least recently used."""

    def values(
        self, uses: npt.NDArray[np.int64], last: npt.NDArray[np.int64], step: int
    ) -> npt.NDArray[np.float64]:
        """Return the step of last use."""
        return last.astype(np.float64)


class LFRU(EvictionPolicy):
    """Least frequently and recently used: uses / (age + 1), age in steps.

    Source: arXiv 2608.07911; best causal policy in most replays of mixture-of-experts traces.
    """

    def values(
        self, uses: npt.NDArray[np.int64], last: npt.NDArray[np.int64], step: int
    ) -> npt.NDArray[np.float64]:
        """Return uses / (step - last + 1); 0 if never used."""
        worth: npt.NDArray[np.float64] = uses / (step + 1 - last)
        return worth


# By exact type: a subclass may rank by other rules.
_NATIVE: dict[type[EvictionPolicy], str] = {LRU: "lru", LFRU: "lfru"}
