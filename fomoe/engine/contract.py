"""Holds one request to its quality: the rule of each decode step, the price of a read in it."""

from __future__ import annotations

from fomoe.quality import Quality
from fomoe.routing import CacheAwareRouting, ExactRouting, PriceRouting, Rule
from fomoe.routing.price import BudgetPrice, LossPrice, is_sampled

KL_EVERY = 16  # a controller of the loss samples one step in so many


class Contract:
    """A request's quality while it runs; a function of its own counts, told after each step.

    Attributes:
        quality: what is held.
        steps: decode steps done.
        shadow_steps: those of them that were also computed exactly.
        loss: their losses' sum, in nanonats.
    """

    def __init__(self, quality: Quality, shadow_every: int) -> None:
        self.quality = quality
        self.steps = self.shadow_steps = self.loss = 0
        self._every = 0 if quality.is_exact else shadow_every
        self._control: BudgetPrice | LossPrice | None = None
        if quality.kind == "bytes":
            self._control = BudgetPrice(int(quality.value))
        elif quality.kind == "kl":
            self._control = LossPrice.towards(quality.value)
            self._every = KL_EVERY
        self._fixed: Rule | None = None
        if quality.is_exact:
            self._fixed = ExactRouting()
        elif quality.kind == "car":
            self._fixed = CacheAwareRouting(quality.value)

    @property
    def rule(self) -> Rule:
        """The rule of the next decode step."""
        return self._fixed or PriceRouting(self.price)

    @property
    def price(self) -> float:
        """The price of a read in the next step; 0 where the rule has none."""
        if self._control is not None:
            return self._control.price
        return self.quality.value if self.quality.kind == "price" else 0.0

    @property
    def is_shadowed(self) -> bool:
        """Whether the next step is to be computed exactly as well."""
        return is_sampled(self.steps, self._every)

    def stepped(self, spent: int, loss: int | None) -> None:
        """Count a decode step.

        Args:
            spent: bytes of the experts that the step and its shadow asked for and that were not
                logically resident.
            loss: KL(exact, step) in nanonats where the step was shadowed, else None.
        """
        self.steps += 1
        if loss is not None:
            self.shadow_steps += 1
            self.loss += loss
        if isinstance(self._control, BudgetPrice):
            self._control = self._control.after(spent)
        elif isinstance(self._control, LossPrice) and loss is not None:
            self._control = self._control.after(loss)
