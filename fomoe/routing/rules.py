"""Routing rules over arrays with a leading axis, one small class each; all are pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fomoe.routing.router import Route, pick, route_exact, softmax


class Rule(Protocol):
    """Chooses experts and weights."""

    def route(
        self, logits: npt.NDArray[np.float32], k: int, resident: npt.NDArray[np.bool_],
        *, layer: int = 0,
    ) -> Route:  # fmt: skip
        """Return a route for logits [T, E] under what is resident, bool [T, E] or [E]."""


@dataclass(frozen=True, slots=True)
class ExactRouting:
    """The router's own choice, whatever is resident."""

    def route(
        self, logits: npt.NDArray[np.float32], k: int, resident: npt.NDArray[np.bool_],
        *, layer: int = 0,
    ) -> Route:  # fmt: skip
        """See `route_exact`."""
        del resident, layer
        return route_exact(logits, k)


@dataclass(frozen=True, slots=True)
class PriceRouting:
    """A missing expert runs if it is worth a price more than the best resident one."""

    price: float
    protected: int = 2
    kappa: float = 1.0
    sensitivities: tuple[float, ...] = ()

    def route(
        self, logits: npt.NDArray[np.float32], k: int, resident: npt.NDArray[np.bool_],
        *, layer: int = 0,
    ) -> Route:  # fmt: skip
        """Choose k experts per token by share of the exact choice's mass less the price."""
        exact = route_exact(logits, k)
        p = softmax(logits)
        mass = pick(p, exact.ids).cumsum(axis=1)[:, -1:]
        share = p / mass
        price = np.float32(self.price)
        if self.sensitivities:
            price /= np.float32(self.sensitivities[layer])
        worth = share - price * ~np.broadcast_to(resident, share.shape)
        rows = np.arange(len(worth))[:, None]
        worth[rows, exact.ids[:, : self.protected]] = np.inf
        ids = np.argsort(-worth, axis=1, kind="stable")[:, :k].astype(np.int32)
        weights = share[rows, ids]
        lost = 1 - weights.sum(axis=1, keepdims=True)
        weights = weights * (1 + np.float32(self.kappa) * lost / (1 - lost))
        substituted = ~(ids[:, :, None] == exact.ids[:, None, :]).any(axis=2)
        return Route(ids, weights.astype(np.float32), substituted)
