"""Guesses about the next layer's experts; they may change speed, never the text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.routing import _routing
from fomoe.routing.router import check_k, refuse_broken, route_exact

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
    wanted = np.bincount(route_exact(logits, k).ids.ravel(), minlength=n_experts)
    expected: npt.NDArray[np.bool_] = wanted >= (2 if n_tokens >= SURE_TOKENS else 1)
    return expected


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """The experts that a layer is expected to want, the surest first.

    Attributes:
        ids: int32 [n], distinct.
        margins: float32 [n], how far each one's probability lies above that of the first expert
            that would not be chosen, over the sum of the chosen ones' (0 to 1).
    """

    ids: npt.NDArray[np.int32]
    margins: npt.NDArray[np.float32]


def predict_experts(logits: npt.NDArray[np.float32], k: int) -> Prediction:
    """Rank the experts that a layer is expected to want.

    Args:
        logits: float32 [T, E], the layer's router applied to an earlier layer's hidden state.
        k: experts per token.

    Returns:
        The union of the tokens' top-k by the greatest margin that any token gives, then lower id.

    Raises:
        ConfigError: k does not fit E.
        EngineError: a row of logits is not finite.
    """
    logits = np.ascontiguousarray(logits, dtype=np.float32)
    n_experts = logits.shape[1]
    check_k(k, n_experts)
    ranked = np.empty(n_experts, dtype=np.int32)
    margins = np.empty(n_experts, dtype=np.float32)
    n = _routing.predict(logits, k, ranked, margins)
    refuse_broken(-1 - n, len(logits))
    return Prediction(ranked[:n], margins[:n])
