"""Guesses about the next layer's experts; they may change speed, never the text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.routing.router import best_ids, softmax, sort_keys


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
