"""The exact router: top-k by float32 logit, weights renormalised over the chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError, EngineError
from fomoe.routing import _routing


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """What runs for each token, best rank first.

    `ids` is int32 [T, k], `weights` float32 [T, k]; `substituted` bool [T, k] marks ranks where a
    resident expert runs in place of the one that the router chose. Rules that drop experts put
    id -1 and weight 0 in their place.
    """

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    substituted: npt.NDArray[np.bool_]


def route_exact(logits: npt.NDArray[np.float32], k: int) -> Route:
    """Choose each token's k best experts.

    Softmax in float32 over all experts; the order is logit descending, then lower id; weights are
    p_i over the sum of the chosen p. A token's bits do not depend on its neighbours;
    `fomoe.routing.reference` defines them.

    Args:
        logits: float32 [T, E], router scores; -inf never wins against a number.
        k: experts per token, 1 <= k <= E.

    Returns:
        A route with nothing substituted.

    Raises:
        ConfigError: k does not fit E.
        EngineError: a row holds NaN, +inf or nothing but -inf.
    """
    logits = np.ascontiguousarray(logits, dtype=np.float32)
    check_k(k, logits.shape[1])
    ids = np.empty((len(logits), k), dtype=np.int32)
    weights = np.empty(ids.shape, dtype=np.float32)
    refuse_broken(_routing.route(logits, ids, weights), len(logits))
    return Route(ids, weights, np.zeros(ids.shape, dtype=np.bool_))


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Softmax over the last axis in float32; [T, E] to [T, E].

    Raises:
        EngineError: a row holds NaN, +inf or nothing but -inf; names the row.
    """
    logits = np.ascontiguousarray(logits, dtype=np.float32)
    probabilities = np.empty_like(logits)
    refuse_broken(_routing.softmax(logits, probabilities), len(logits))
    return probabilities


def refuse_broken(row: int, n_rows: int) -> None:
    """Raise for a row of router scores that is not finite; -1 is none."""
    if row >= 0:
        raise EngineError(
            f"router logits of token {row} of {n_rows} are not finite; the hidden state is "
            f"broken: check the model file, and report it with the prompt"
        )


def check_k(k: int, n_experts: int) -> None:
    """Raise ConfigError unless 1 <= k <= E."""
    if not 1 <= k <= n_experts:
        raise ConfigError(f"{k} experts per token of {n_experts}: choose 1 to {n_experts}")
