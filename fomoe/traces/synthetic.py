"""Traces that resemble a large model's, from random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.traces.format import TraceFacts
from fomoe.traces.reader import Trace
from fomoe.traces.records import Passage
from fomoe.traces.rows import RouterRows, cut_rows

_TOPIC, _CONTEXT = 150, 6  # half-lives in tokens
_BLOCK_TOKENS = 64

Reals = npt.NDArray[np.floating[Any]]


class SyntheticRouter:
    """Draws router scores token by token.

    An expert's score is popularity + topic + context + noise; topic and context are first-order
    autoregressive with half-lives of 150 and 6 tokens, and begin afresh with each text. The weights
    give an LRU of 50, 86 and 128 slots per layer of 512 experts hit rates of 61, 72 and 80 % at
    top-10; measured were 60 and 72 % (FOMOE, 397B) and 81 % (llama.cpp #27861, 512 experts).

    Args:
        n_layers: L.
        n_experts: E.
        seed: of all random numbers.
        dtype: float32 or float64, of the scores; their random numbers differ.
    """

    def __init__(
        self, n_layers: int, n_experts: int, seed: int, dtype: type[Any] = np.float64
    ) -> None:
        self._shape, self._dtype = (n_layers, n_experts), dtype
        self._rng = np.random.default_rng(seed)
        self._popularity, self._topic, self._context = self._draw(3)

    def new_text(self) -> None:
        """Draw a new topic and context."""
        self._topic, self._context = self._draw(2)

    def scores(self) -> Reals:
        """Return the next token's scores [L, E]."""
        topic, context, noise = self._draw(3)
        self._topic = _drifted(self._topic, topic, _TOPIC)
        self._context = _drifted(self._context, context, _CONTEXT)
        lasting = 0.3 * self._popularity + 0.9 * self._topic
        scores: Reals = lasting + (0.8 * self._context + 0.9 * noise)
        return scores

    def _draw(self, count: int) -> Reals:
        """Return standard normal numbers [count, L, E]."""
        drawn: Reals = self._rng.standard_normal((count, *self._shape), self._dtype)
        return drawn


def _drifted(state: Reals, noise: Reals, half_life: float) -> Reals:
    """Advance a stationary autoregressive process of unit variance by one token."""
    keep = 0.5 ** (1 / half_life)
    # Factors are Python floats, which leave the type of an array as it is.
    drifted: Reals = keep * state + math.sqrt(1 - keep**2) * noise
    return drifted


def synthetic_ids(
    n_tokens: int, n_layers: int, seed: int, *, n_experts: int = 512, top_k: int = 10
) -> npt.NDArray[np.int32]:
    """Return the experts that a synthetic text wants: int32 [T, L, k], distinct in a row."""
    router = SyntheticRouter(n_layers, n_experts, seed)
    ids = np.empty((n_tokens, n_layers, top_k), dtype=np.int32)
    for token in range(n_tokens):
        ids[token] = np.argpartition(router.scores(), -top_k, axis=1)[:, -top_k:]
    return ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthesis:
    """What to synthesise.

    Attributes:
        facts: the model.
        texts: how many texts.
        tokens: of each text.
        domains: text i is of domain `synthetic-{i mod domains}`; all are drawn alike.
        sharpness: scores are multiplied by it; 1 gives an exact top-10 of 512 about a quarter of
            a row's probability.
        seed: of all random numbers.
    """

    facts: TraceFacts
    texts: int = 1
    tokens: int = 1000
    domains: int = 1
    sharpness: float = 1.0
    seed: int = 0

    def passages(self) -> Iterator[tuple[Passage, RouterRows]]:
        """Yield the texts in pieces, each with its rows."""
        facts = self.facts
        router = SyntheticRouter(facts.n_layers, facts.n_experts, self.seed)
        for text in range(self.texts):
            if text:
                router.new_text()
            for start in range(0, self.tokens, _BLOCK_TOKENS):
                count = min(_BLOCK_TOKENS, self.tokens - start)
                scores = np.stack([router.scores() for _ in range(count)], axis=1)
                rows = cut_rows((self.sharpness * scores).astype(np.float32))
                passage = Passage(
                    sequence=text, tokens=range(start, start + count), position=start,
                    label=f"text-{text}", domain=f"synthetic-{text % self.domains}",
                )  # fmt: skip
                yield passage, rows


def synthetic_trace(synthesis: Synthesis) -> Trace:
    """Return a synthetic trace in memory."""
    return Trace.of(synthesis.facts, synthesis.passages())
