"""The exact router: top-k by float32 logit, weights renormalised over the chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError, EngineError
from fomoe.routing import _routing

_LOWEST = np.iinfo(np.int64).min


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """What runs for each token, best rank first.

    `ids` is int32 [T, k], `weights` float32 [T, k]; `substituted` bool [T, k] marks ranks where a
    resident expert runs in place of the one that the router chose.
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


def pick(values: npt.NDArray[np.float32], ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Return values [T, E] at ids [T, k]; several times faster than `np.take_along_axis`."""
    picked: npt.NDArray[np.float32] = values[np.arange(len(ids))[:, None], ids]
    return picked


def sort_keys(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Map logits [T, E] to int64 keys, all different in a row, that sort as the router does.

    The upper half is the float's bit pattern made monotone, the lower half E - 1 - id: a greater
    key is a greater logit or, at equal logits, a lower id. Adding zero makes -0.0 equal 0.0.
    """
    n_experts = logits.shape[1]
    bits = (np.asarray(logits, dtype=np.float32) + np.float32(0)).view(np.int32)
    monotone = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    keys = monotone.astype(np.int64)
    keys <<= 32
    keys |= np.arange(n_experts - 1, -1, -1, dtype=np.int64)
    return keys


def best_ids(keys: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.int32]:
    """Return the ids of the k greatest keys of each row of [T, E], greatest first.

    Raises:
        ConfigError: k does not fit E.
    """
    n_experts = keys.shape[1]
    check_k(k, n_experts)
    # NumPy's partition is a SIMD quick-select here; a full sort of 512 costs several times more.
    top = np.partition(keys, n_experts - k, axis=1)[:, n_experts - k :]
    top.sort(axis=1)
    ids: npt.NDArray[np.int32] = (n_experts - 1 - (top[:, ::-1] & 0xFFFFFFFF)).astype(np.int32)
    return ids


def hide(keys: npt.NDArray[np.int64], hidden: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return keys [T, E] with the hidden ones moved behind every other, their ids kept."""
    n_experts = keys.shape[1]
    behind = _LOWEST + np.arange(n_experts - 1, -1, -1, dtype=np.int64)
    return np.where(hidden, behind, keys)
