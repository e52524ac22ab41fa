"""How far one row of logits is from another, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError

F64 = npt.NDArray[np.float64]
# Rows in float64 at once: 32 x 248,320 x 8 bytes = 64 MB.
_ROWS = 32


def log_softmax(logits: npt.NDArray[np.floating]) -> F64:
    """Return float64 log probabilities of logits [..., V]."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def kl_of_logs(p: F64, q: F64) -> F64:
    """Return KL(P || Q) in nats, float64 [...], of log probabilities [..., V].

    What P rules out adds nothing. Rounding leaves about 1e-16 either side of 0 where both are
    alike; the result is never below it.
    """
    weights = np.exp(p)
    with np.errstate(invalid="ignore"):  # -inf - -inf, where both rule a token out
        terms = np.where(weights > 0.0, weights * (p - q), 0.0)
    kl: F64 = np.maximum(terms.sum(axis=-1), 0.0)
    return kl


def negative_log_likelihoods(
    logits: npt.NDArray[np.floating], targets: npt.NDArray[np.integer]
) -> F64:
    """Return -log softmax(logits)[target], float64 [T], of logits [T, V] and targets [T]."""
    out = np.empty(len(targets))
    for start in range(0, len(targets), _ROWS):
        part = targets[start : start + _ROWS]
        rows = log_softmax(logits[start : start + _ROWS])
        out[start : start + len(part)] = -rows[np.arange(len(part)), part]
    return out


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """What a policy did to each of T tokens.

    Attributes:
        exact_nll: float64 [T], -log p of the true token in exact mode.
        policy_nll: float64 [T], the same under the policy.
        kl: float64 [T], KL(exact || policy) in nats over the whole vocabulary.
        agrees: bool [T], whether both name the same likeliest token.
    """

    exact_nll: F64
    policy_nll: F64
    kl: F64
    agrees: npt.NDArray[np.bool_]

    @classmethod
    def joined(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """Return several runs' scores one behind the other; at least one."""
        names = [part.name for part in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @property
    def excess(self) -> F64:
        """Float64 [T], the policy's NLL minus that of exact mode."""
        return self.policy_nll - self.exact_nll


def compare(
    exact: npt.NDArray[np.floating],
    policy: npt.NDArray[np.floating],
    targets: npt.NDArray[np.integer],
) -> TokenScores:
    """Compare logits [T, V] of both runs at the same positions; targets [T] came next.

    Likeliest means the greatest logit, at equal ones the lower id.

    Raises:
        ConfigError: shapes differ, or a logit is not finite.
    """
    if exact.shape != policy.shape or exact.shape[:1] != targets.shape:
        raise ConfigError(
            f"logits {exact.shape} and {policy.shape} and {targets.shape} targets do not fit"
        )
    n = len(targets)
    out = TokenScores(np.empty(n), np.empty(n), np.empty(n), np.empty(n, np.bool_))
    for start in range(0, n, _ROWS):
        rows = slice(start, min(start + _ROWS, n))
        if not (np.isfinite(exact[rows]).all() and np.isfinite(policy[rows]).all()):
            raise ConfigError(f"logits of tokens {start} to {rows.stop - 1} are not finite")
        p, q = log_softmax(exact[rows]), log_softmax(policy[rows])
        each = np.arange(len(p))
        out.exact_nll[rows] = -p[each, targets[rows]]
        out.policy_nll[rows] = -q[each, targets[rows]]
        out.kl[rows] = kl_of_logs(p, q)
        out.agrees[rows] = exact[rows].argmax(axis=1) == policy[rows].argmax(axis=1)
    return out


def kl_divergence(exact: npt.NDArray[np.floating], policy: npt.NDArray[np.floating]) -> F64:
    """Return KL(softmax(exact) || softmax(policy)) in nats, float64 [T], of logits [T, V]."""
    return compare(exact, policy, np.zeros(len(exact), np.int64)).kl
