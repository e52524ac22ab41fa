"""A sequence: its tokens, its state in every layer, its own logical view of the expert cache."""

from __future__ import annotations

from fomoe.model.spec import ModelSpec
from fomoe.model.state import SequenceState
from fomoe.residency import LogicalCache, LogicalRules


class Sequence:
    """One text under way; `tokens` are those that have gone through the layers.

    `car` is the cache-aware threshold that decode steps use (0: exact); it never acts in prefill.
    `decoding` says whether the next step is a decode step. `lossy` stays set once a substituted
    expert may have touched the state, so that no exact request continues from it.
    """

    def __init__(self, spec: ModelSpec, ctx_size: int, kv_dtype: str, capacity: int) -> None:
        self.state = SequenceState(spec, ctx_size, kv_dtype)
        self.logical = LogicalCache(
            spec.n_layers, spec.moe.n_experts, LogicalRules(capacity=capacity)
        )
        self._nothing = self.logical.snapshot()
        self.tokens: list[int] = []
        self.car = 0.0
        self.decoding = False
        self.lossy = False

    def reset(self) -> None:
        """Forget the text; memory stays reserved."""
        self.state.reset()
        self.logical.restore(self._nothing)
        self.tokens.clear()
        self.car = 0.0
        self.decoding = False
        self.lossy = False

    def reusable_prefix(self, prompt: list[int]) -> int:
        """Return how many leading tokens of `prompt` this state already holds (all or nothing).

        The recurrent layers cannot go back, so the whole state must be a proper prefix.
        """
        held = len(self.tokens)
        if self.lossy or held == 0 or held >= len(prompt) or prompt[:held] != self.tokens:
            return 0
        return held
