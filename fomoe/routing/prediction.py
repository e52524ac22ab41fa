"""Guesses about the next layer's experts; they may change speed, never the text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.routing.router import best_ids, softmax, sort_keys

SURE_TOKENS = 32  # a chunk of so many tokens is guessed from those that two of them want


def expect_of_chunk(logits: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.bool_]:
    """Tell which experts a layer is expected to want for a chunk of a prompt.

    Args:
        logits: float32 [T, E], as in `predict_experts`; of a sample of the chunk's tokens.
        k: experts per token.

    Returns:
        bool [E], the experts in the top-k of two tokens, or of one where T is small.
    """
    n_tokens, n_experts = logits.shape
    wanted = np.bincount(best_ids(sort_keys(logits), k).ravel(), minlength=n_experts)
    expected: npt.NDArray[np.bool_] = wanted >= (2 if n_tokens >= SURE_TOKENS else 1)
    return expected


def predict_experts(logits: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int32]:
    """Rank the experts that a layer is expected to want.

    Args:
        logits: float32 [T, E], the layer's router applied to an earlier layer's hidden state.
        k: experts per token.

    Returns:
        int32 [n], the union of the tokens' top-k, by the greatest probability that any token
        gives (descending), then lower id.

    Raises:
        ConfigError: k does not fit E.
        EngineError: a row of logits is not finite.
    """
    chosen = np.unique(best_ids(sort_keys(logits), k))
    peak = softmax(logits).max(axis=0)[chosen]
    ranked: npt.NDArray[np.int32] = chosen[np.argsort(-peak, kind="stable")]
    return ranked
