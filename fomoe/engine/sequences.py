"""A sequence: its tokens, its state in every layer, its own logical view of the expert cache."""

from __future__ import annotations

import numpy as np

from fomoe.engine.decisions import Decider
from fomoe.errors import ConfigError
from fomoe.model.buffers import F32
from fomoe.model.spec import ModelSpec
from fomoe.model.state import SequenceState
from fomoe.residency import LogicalCache, LogicalRules
from fomoe.routing import DropRouting, ExactRouting, RoutingRule


class Sequence:
    """One text under way; `tokens` are those that have gone through the layers.

    `decider` chooses the experts of decode steps under a lossy rule, at `prices` float32 [1] in
    place of the rule's own; None is exact. It never acts in prefill. `reads` int64 [L] counts what
    the last such step read, by its logical cache.
    `touched` is the share of routing weights that decode steps round to bfloat16, the null of
    evaluations (`routing.nulls`).
    `decoding` says whether the next step is a decode step. `lossy` stays set once a substituted
    expert may have touched the state, or a price the decision hash, so that no exact request
    continues from it. Its logical cache begins as `frequencies` float32 [L, E] say, where they are
    given. `state` stands in for one that is held in this process.
    """

    def __init__(
        self, spec: ModelSpec, ctx_size: int, kv_dtype: str, rules: LogicalRules,
        frequencies: F32 | None = None, state: SequenceState | None = None,
    ) -> None:  # fmt: skip
        self.state = SequenceState(spec, ctx_size, kv_dtype) if state is None else state
        self.logical = LogicalCache(spec.n_layers, spec.moe.n_experts, rules)
        if frequencies is not None:
            self.logical.caches.warm(frequencies)
        self._fresh = self.logical.snapshot()
        self.tokens: list[int] = []
        self.decider: Decider | None = None
        self.prices: F32 | None = None
        self._top_k = spec.moe.top_k
        self.touched = 0.0
        self.reads = np.zeros(spec.n_layers, np.int64)
        self.decoding = False
        self.lossy = False

    def reset(self) -> None:
        """Forget the text; memory stays reserved."""
        self.state.reset()
        self.logical.restore(self._fresh)
        self.tokens.clear()
        self.hold(ExactRouting())
        self.touched = 0.0
        self.decoding = False
        self.lossy = False

    @property
    def exact(self) -> bool:
        """Whether nothing may differ from the router's choice."""
        return self.decider is None

    def hold(self, rule: RoutingRule) -> None:
        """Let a rule choose the experts of decode steps, at its own price.

        Raises:
            ConfigError: a step runs k experts, and the rule may drop some.
        """
        if isinstance(rule, DropRouting):
            raise ConfigError("dropping experts can be replayed and evaluated, not served")
        lossy = not isinstance(rule, ExactRouting)
        self.decider = Decider(rule, self.logical.caches, self._top_k) if lossy else None
        self.prices = None

    def reusable_prefix(self, prompt: list[int]) -> int:
        """Return how many leading tokens of `prompt` this state already holds (all or nothing).

        The recurrent layers cannot go back, so the whole state must be a proper prefix.
        """
        held = len(self.tokens)
        if self.lossy or held == 0 or held >= len(prompt) or prompt[:held] != self.tokens:
            return 0
        return held
