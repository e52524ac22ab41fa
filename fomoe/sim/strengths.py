"""How strong a rule is at each token of each text: as given, or steered by a byte budget."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.routing.price import BudgetPrice
from fomoe.routing.rules import CacheAwareRouting, DropRouting, ExactRouting, PriceRouting

Rule = ExactRouting | CacheAwareRouting | PriceRouting | DropRouting
_NEVER = 2.0  # no probability is so many times another one of a lower rank


def _strength_of(rule: Rule) -> tuple[float, float] | None:
    """Return the strength of a rule, and the one at which it is exact; None if it always is."""
    if isinstance(rule, CacheAwareRouting):
        return rule.threshold, _NEVER
    if isinstance(rule, PriceRouting):
        return rule.price, 0.0
    if isinstance(rule, DropRouting):
        return rule.weight, 0.0
    return None


class Strengths:
    """The strengths of some texts; with a budget, each has a price of its own (`BudgetPrice`)."""

    def __init__(
        self, rule: Rule, n_texts: int, budget_bytes: int, expert_bytes: tuple[int, ...]
    ) -> None:
        own = _strength_of(rule)
        self.is_lossy = own is not None
        self._exact = 0.0 if own is None else own[1]
        self._values = np.full(n_texts, 0.0 if own is None else own[0], np.float32)
        self._sizes = np.array(expert_bytes, np.int64)
        self._prices: list[BudgetPrice] = []
        if budget_bytes:
            self._prices = [BudgetPrice(budget_bytes)] * n_texts
            self._values[:] = self._prices[0].price

    @property
    def is_steered(self) -> bool:
        """Whether `spent` wants to know what tokens read."""
        return bool(self._prices)

    def at(self, is_prompt: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32] | None:
        """Return the strengths of the first n texts, float32 [n], for tokens that may be prompt's.

        None where the rule is always exact.
        """
        if not self.is_lossy:
            return None
        exact = np.float32(self._exact)
        return np.where(is_prompt, exact, self._values[: len(is_prompt)])

    def spent(self, is_prompt: npt.NDArray[np.bool_], reads: npt.NDArray[np.int64]) -> None:
        """Take note of what the first n texts' tokens read, int64 [L, n] experts."""
        for i, total in enumerate((self._sizes @ reads).tolist()):
            if not is_prompt[i]:
                self._prices[i] = self._prices[i].after(total)
                self._values[i] = self._prices[i].price
