"""Holds one request to its quality: the rule of each decode step, the price of a read in it."""

from __future__ import annotations

from fomoe.quality import Quality
from fomoe.routing import CacheAwareRouting, ExactRouting, PriceRouting, RoutingRule
from fomoe.routing.price import BudgetPrice, LossPrice, is_sampled

# A controller of the loss samples one step in so many: often until it has found the price.
KL_EVERY, KL_EVERY_LATER, KL_SETTLED = 16, 64, 256

# A shadow step starts from the answer's own state and so does not see what earlier substitutions
# did to it. Measured on other text than any that is scored, the whole loss against an answer that
# was exact from its start is this multiple of the step's, at prices that lose 0.005 to 0.02 nats
# (benchmarks/quality_contract.py prints both).
WHOLE_OVER_STEP = (7, 5)


class Contract:
    """A request's quality while it runs; a function of its own counts, told after each step.

    Attributes:
        quality: what is held.
        rule: what chooses the experts of decode steps, at each one's `price`.
        steps: decode steps done.
        shadow_steps: those of them that were also computed exactly.
        loss: the sum of their losses against a wholly exact answer, estimated, in nanonats.
    """

    def __init__(
        self, quality: Quality, shadow_every: int, sensitivities: tuple[float, ...] = ()
    ) -> None:
        self.quality = quality
        self.steps = self.shadow_steps = self.loss = 0
        self._every = 0 if quality.is_exact else shadow_every
        self._control: BudgetPrice | LossPrice | None = None
        if quality.kind == "bytes":
            self._control = BudgetPrice(int(quality.value))
        elif quality.kind == "kl":
            self._control = LossPrice.towards(quality.value)
        self.rule = _rule(quality, sensitivities)

    @property
    def price(self) -> float | None:
        """The price of a read in the next step; None where the rule has none."""
        if self._control is not None:
            return self._control.price
        return self.quality.value if self.quality.kind == "price" else None

    @property
    def is_shadowed(self) -> bool:
        """Whether the next step is to be computed exactly as well."""
        every = self._every
        if self.quality.kind == "kl":
            every = KL_EVERY if self.steps < KL_SETTLED else KL_EVERY_LATER
        return is_sampled(self.steps, every)

    @property
    def needs_twin(self) -> bool:
        """Whether a step may have to be computed exactly as well."""
        return self.quality.kind == "kl" or self._every > 0

    def stepped(self, spent: int, step_loss: int | None) -> int:
        """Count a decode step.

        Args:
            spent: bytes of the experts that the step and its shadow asked for and that were not
                logically resident.
            step_loss: KL(exact, step) in nanonats where the step was shadowed, else None.

        Returns:
            The estimate of the token's whole loss in nanonats, 0 where the step was not shadowed.
        """
        self.steps += 1
        if isinstance(self._control, BudgetPrice):
            self._control = self._control.after(spent)
        if step_loss is None:
            return 0
        loss = step_loss * WHOLE_OVER_STEP[0] // WHOLE_OVER_STEP[1]
        self.shadow_steps += 1
        self.loss += loss
        if isinstance(self._control, LossPrice):
            self._control = self._control.after(loss)
        return loss


def _rule(quality: Quality, sensitivities: tuple[float, ...]) -> RoutingRule:
    if quality.is_exact:
        return ExactRouting()
    if quality.kind == "car":
        return CacheAwareRouting(quality.value)
    return PriceRouting(0.0, sensitivities=sensitivities)
