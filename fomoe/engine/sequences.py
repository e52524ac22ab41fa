"""A sequence: its tokens, its state in every layer, its own logical view of the expert cache."""

from __future__ import annotations

import numpy as np

from fomoe.model.spec import ModelSpec
from fomoe.model.state import SequenceState
from fomoe.residency import LogicalCache
from fomoe.routing import ExactRouting, RoutingRule


class Sequence:
    """One text under way; `tokens` are those that have gone through the layers.

    `rule` chooses the experts of decode steps; it never acts in prefill. `reads` int64 [L] counts
    the experts of the last step that were not logically resident, where the rule is lossy.
    `touched` is the share of routing weights that decode steps round to bfloat16 (the null of
    evaluations, `routing.nulls`). `decoding` says whether the next step is a decode step. `lossy`
    stays set once a substituted expert may have touched the state, so that no exact request
    continues from it.
    """

    def __init__(self, spec: ModelSpec, ctx_size: int, kv_dtype: str, capacity: int) -> None:
        self.state = SequenceState(spec, ctx_size, kv_dtype)
        self.logical = LogicalCache(spec.n_layers, spec.moe.n_experts, capacity)
        self._nothing = self.logical.snapshot()
        self.tokens: list[int] = []
        self.rule: RoutingRule = ExactRouting()
        self.touched = 0.0
        self.reads = np.zeros(spec.n_layers, np.int64)
        self.decoding = False
        self.lossy = False

    def reset(self) -> None:
        """Forget the text; memory stays reserved."""
        self.state.reset()
        self.logical.restore(self._nothing)
        self.tokens.clear()
        self.rule = ExactRouting()
        self.touched = 0.0
        self.decoding = False
        self.lossy = False

    @property
    def exact(self) -> bool:
        """Whether nothing may differ from the router's choice."""
        return isinstance(self.rule, ExactRouting)

    def reusable_prefix(self, prompt: list[int]) -> int:
        """Return how many leading tokens of `prompt` this state already holds (all or nothing).

        The recurrent layers cannot go back, so the whole state must be a proper prefix.
        """
        held = len(self.tokens)
        if self.lossy or held == 0 or held >= len(prompt) or prompt[:held] != self.tokens:
            return 0
        return held
