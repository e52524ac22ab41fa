"""Routing rules: which experts run, and with what weights, given what is resident.

p is the softmax over all experts, S the exact top-k, P_S the sum of p over S by falling rank, and
w = p / P_S an expert's weight. Everything is float32 in one order; `fomoe.routing.reference` has
the same rules in Python, equal to the bit. Order among experts is the router's: logit descending,
then lower id.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError
from fomoe.routing import _routing
from fomoe.routing.router import Route, check_k, refuse_broken

NO_BUDGET = 1 << 30


class RoutingRule(Protocol):
    """What turns a row of router scores into a route."""

    @property
    def native(self) -> _routing.Rule:
        """The rule as native code takes it."""

    @property
    def name(self) -> str:
        """The rule and its strength, as tables print it."""

    def route(
        self, logits: npt.NDArray[np.float32], k: int, resident: npt.NDArray[np.bool_],
        *, layer: int = 0,
    ) -> Route:  # fmt: skip
        """Choose k experts per token.

        Args:
            logits: float32 [T, E], router scores.
            k: experts per token, 1 <= k <= E.
            resident: bool [T, E] or [E], the experts that may run without a read.
            layer: index of the MoE layer, where the rule has sensitivities.

        Returns:
            The route; `id` -1 with weight 0 stands for a dropped expert.

        Raises:
            ConfigError: k does not fit E.
            EngineError: a row of logits is not finite.
        """


class _Native(ABC):
    """The `route` of rules that native code runs."""

    __slots__ = ()

    @property
    @abstractmethod
    def native(self) -> _routing.Rule:
        """The rule as native code takes it."""

    def route(
        self, logits: npt.NDArray[np.float32], k: int, resident: npt.NDArray[np.bool_],
        *, layer: int = 0,
    ) -> Route:  # fmt: skip
        """Choose k experts per token; see `RoutingRule.route`."""
        logits = np.ascontiguousarray(logits, dtype=np.float32)
        check_k(k, logits.shape[1])
        mask = np.ascontiguousarray(np.broadcast_to(resident, logits.shape), dtype=np.bool_)
        ids = np.empty((len(logits), k), dtype=np.int32)
        weights = np.empty(ids.shape, dtype=np.float32)
        substituted = np.empty(ids.shape, dtype=np.bool_)
        broken = _routing.choose(self.native, layer, logits, mask, ids, weights, substituted)
        refuse_broken(broken, len(logits))
        return Route(ids, weights, substituted)


@dataclass(frozen=True, slots=True)
class ExactRouting(_Native):
    """The router's own top-k, whatever is resident."""

    @property
    def native(self) -> _routing.Rule:
        """The rule as native code takes it."""
        return _routing.Rule("exact", 0.0, 0.0, 0, 0, [])

    @property
    def name(self) -> str:
        """`exact`."""
        return "exact"


@dataclass(frozen=True, slots=True)
class CacheAwareRouting(_Native):
    """The ratio rule: swap a missing expert for the best resident one if it scores close enough.

    Walks the missing experts of a token by rank. The best resident expert that the token does not
    run already takes the place if its p is at least `threshold` times the missing one's. It keeps
    its own p over P_S (dampening), the others keep their weights, and nothing is renormalised
    unless `renormalise` asks for it. 0 swaps whenever a candidate is left; a threshold above 1
    never swaps. At most `budget` experts of a token are swapped in a layer, the first by rank
    (None: no limit).

    Source: FOMOE, `car_evaluate` with QMOE_CAR_DAMPEN.
    """

    threshold: float
    budget: int | None = None
    renormalise: bool = False

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ConfigError(f"cache-aware threshold {self.threshold}: give a number >= 0")
        if self.budget is not None and self.budget < 0:
            raise ConfigError(f"cache-aware budget {self.budget}: give a number >= 0 or none")

    @property
    def native(self) -> _routing.Rule:
        """The rule as native code takes it."""
        budget = NO_BUDGET if self.budget is None else self.budget
        kappa = 1.0 if self.renormalise else 0.0
        return _routing.Rule("cache_aware", self.threshold, kappa, 0, budget, [])

    @property
    def name(self) -> str:
        """`car` and the threshold."""
        return f"car {self.threshold:.2f}"


@dataclass(frozen=True, slots=True)
class PriceRouting(_Native):
    """A read costs a price in probability: run the k best of w - price * [not resident] / s.

    s is the layer's sensitivity. The `protected` top ranks always run; at equal values the
    router's order decides. The lost mass m = 1 - (sum of w over what runs) is given back by
    w *= 1 + kappa * m / (1 - m): kappa 1 renormalises, 0 keeps each expert's own w. The kept
    experts stand first, then the substitutes, each in the router's order.

    Source: the gain of a token's next read never rises, so at a fixed number of reads over all
    layers the optimum for the sum of p has one price (docs/adr/0014). The defaults lose least on a
    model of 128 experts a layer (docs/log.md).
    """

    price: float
    protected: int = 1
    kappa: float = 0.5
    sensitivities: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.price >= 0:
            raise ConfigError(f"price {self.price} of a read: give a number >= 0")
        _check_common(self.protected, self.kappa, self.sensitivities)

    @property
    def native(self) -> _routing.Rule:
        """The rule as native code takes it."""
        given = self.price, self.kappa, self.protected, 0, list(self.sensitivities)
        return _routing.Rule("price", *given)

    @property
    def name(self) -> str:
        """`price` and its size."""
        return f"price {self.price:.4g}"


@dataclass(frozen=True, slots=True)
class DropRouting(_Native):
    """A light missing expert is neither read nor replaced: it runs iff s * w^2 >= weight^2.

    s is the layer's sensitivity; compared is w >= weight / sqrt(s). The `protected` top ranks
    always run. Dropped experts have id -1 and weight 0; the lost mass is given back by kappa as in
    `PriceRouting`. For experts of equal size whose outputs are orthogonal and equally long this
    is the optimal choice of what to read.
    """

    weight: float
    protected: int = 1
    kappa: float = 0.0
    sensitivities: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ConfigError(f"least weight {self.weight} of a read: give a number >= 0")
        _check_common(self.protected, self.kappa, self.sensitivities)

    @property
    def native(self) -> _routing.Rule:
        """The rule as native code takes it."""
        given = self.weight, self.kappa, self.protected, 0, list(self.sensitivities)
        return _routing.Rule("drop", *given)

    @property
    def name(self) -> str:
        """`drop` and the least weight."""
        return f"drop {self.weight:.4g}"


def _check_common(protected: int, kappa: float, sensitivities: tuple[float, ...]) -> None:
    if protected < 0:
        raise ConfigError(f"{protected} protected ranks: give a number >= 0")
    if not 0 <= kappa <= 1:
        raise ConfigError(f"kappa {kappa}: give a share from 0 to 1")
    worst = min(sensitivities, default=1.0)
    if not all(math.isfinite(s) and s > 0 for s in sensitivities):
        raise ConfigError(f"layer sensitivities down to {worst}: give numbers above 0")


@dataclass(frozen=True, slots=True)
class RouteCounts:
    """Activations of a route by outcome: hits + substituted + misses + dropped = T * k."""

    hits: int
    substituted: int
    misses: int
    dropped: int = 0


def count_outcomes(route: Route, resident: npt.NDArray[np.bool_]) -> RouteCounts:
    """Count a route's outcomes under the mask that it was made with (bool [T, E] or [E])."""
    mask = np.broadcast_to(resident, (len(route.ids), resident.shape[-1]))
    dropped = route.ids < 0
    present = np.take_along_axis(mask, np.where(dropped, 0, route.ids), axis=1) & ~dropped
    substituted = int(route.substituted.sum())
    hits = int((present & ~route.substituted).sum())
    lost = int(dropped.sum())
    return RouteCounts(hits, substituted, route.ids.size - hits - substituted - lost, lost)
