"""Paired statistics of a run's tokens, clustered by document.

Tokens of one document share its difficulty and, under a policy, its cache: they are not
independent, documents are. Every interval here resamples whole documents. The percentile bootstrap
is too narrow below about 30 documents, so the number of them stands in every result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError

F64 = npt.NDArray[np.float64]

RESAMPLES = 4000
LEVEL = 0.95
# A ratio of excesses says little where the baseline's own excess is nearer to 0 than this.
JUDGED_SIGMAS = 5.0
# Drawn indices that are in memory at once.
_DRAWS = 1 << 22
_LEAST_CLUSTERS = 5


@dataclass(frozen=True, slots=True, eq=False)
class ClusterSums:
    """Values added up by document.

    Attributes:
        counts: float64 [C], tokens of each document.
        sums: float64 [C, M], each of M paired quantities over a document's tokens.
    """

    counts: F64
    sums: F64

    @property
    def tokens(self) -> int:
        """Tokens over all documents."""
        return int(self.counts.sum())

    @property
    def means(self) -> F64:
        """Float64 [M], means over tokens."""
        means: F64 = self.sums.sum(axis=0) / self.counts.sum()
        return means

    def standard_errors(self) -> F64:
        """Return the cluster-robust standard errors of the means, float64 [M].

        With residual sums e_c = S_c - mean * n_c this is sqrt(C/(C-1) * sum e_c^2) / N (Liang and
        Zeger's sandwich for an intercept, with the usual correction for few clusters).
        """
        n = len(self.counts)
        residuals = self.sums - self.counts[:, None] * self.means
        errors: F64 = np.sqrt(n / (n - 1) * (residuals**2).sum(axis=0)) / self.counts.sum()
        return errors


def cluster_sums(values: npt.ArrayLike, documents: npt.ArrayLike) -> ClusterSums:
    """Add values up by document.

    Args:
        values: [N] or [N, M] finite numbers, one row per token.
        documents: [N] labels of any one type.

    Raises:
        ConfigError: lengths differ, a value is not finite, or there are fewer than two documents.
    """
    rows = np.asarray(values, np.float64)
    rows = rows[:, None] if rows.ndim == 1 else rows
    labels = np.asarray(documents)
    if rows.ndim != 2 or labels.shape != rows.shape[:1]:
        raise ConfigError(
            f"values {rows.shape} and documents {labels.shape} do not belong together"
        )
    if not np.isfinite(rows).all():
        bad = int(np.count_nonzero(~np.isfinite(rows).all(axis=1)))
        raise ConfigError(f"{bad:,} of {len(rows):,} tokens have a value that is not finite")
    _, member, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise ConfigError(f"{len(counts)} document: a spread over documents needs at least 2")
    columns = [np.bincount(member.ravel(), weights=column) for column in rows.T]
    return ClusterSums(counts.astype(np.float64), np.stack(columns, axis=1))


def resampled_means(sums: ClusterSums, *, seed: int, resamples: int = RESAMPLES) -> F64:
    """Return means over tokens of `resamples` draws of C documents, float64 [resamples, M].

    A draw takes whole documents with replacement, so all M quantities of a draw are paired.
    """
    rng = np.random.default_rng(seed)
    n = len(sums.counts)
    columns = np.column_stack([sums.counts, sums.sums])
    out = np.empty((resamples, columns.shape[1]))
    step = max(1, _DRAWS // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, n, (rows, n)) + np.arange(rows)[:, None] * n
        times = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        out[start : start + rows] = times.astype(np.float64) @ columns
    means: F64 = out[:, 1:] / out[:, :1]
    return means


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tokens and how sure it is.

    Attributes:
        mean: The mean.
        standard_error: Cluster-robust.
        low: Lower end of the two-sided bootstrap interval (95 % unless asked otherwise).
        high: Its upper end.
        documents: Documents behind it.
        tokens: Tokens behind it.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    documents: int
    tokens: int


def estimate_mean(
    values: npt.ArrayLike,
    documents: npt.ArrayLike,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Estimate:
    """Estimate the mean of [N] values over tokens, clustered by [N] documents.

    For a paired difference pass policy minus exact, token by token.

    Raises:
        ConfigError: as `cluster_sums`.
    """
    sums = cluster_sums(values, documents)
    draws = resampled_means(sums, seed=seed, resamples=resamples)[:, 0]
    low, high = interval(draws, level)
    return Estimate(
        mean=float(sums.means[0]),
        standard_error=float(sums.standard_errors()[0]),
        low=low,
        high=high,
        documents=len(sums.counts),
        tokens=sums.tokens,
    )


def interval(draws: F64, level: float = LEVEL) -> tuple[float, float]:
    """Return the two-sided percentile interval of bootstrap draws [B]; infinities are allowed."""
    tail = (1.0 - level) / 2
    low = np.quantile(draws, tail, method="lower")
    high = np.quantile(draws, 1.0 - tail, method="higher")
    return float(low), float(high)


def upper_bound(draws: F64, level: float = LEVEL) -> float:
    """Return the one-sided upper bound of bootstrap draws [B]; infinities are allowed."""
    return float(np.quantile(draws, level, method="higher"))


@dataclass(frozen=True, slots=True)
class Ratio:
    """Our mean excess over the baseline's, both over the same tokens.

    Attributes:
        value: Ours / baseline's; infinite where the baseline has no excess.
        low: Lower end of the two-sided interval.
        high: Its upper end.
        upper: One-sided upper bound.
        ours: Our mean excess.
        baseline: The baseline's mean excess.
        sigmas: The baseline's excess in its own standard errors.
        documents: Documents behind it.
        tokens: Tokens behind it.
    """

    value: float
    low: float
    high: float
    upper: float
    ours: float
    baseline: float
    sigmas: float
    documents: int
    tokens: int

    @property
    def is_judged(self) -> bool:
        """Whether the baseline's excess is far enough from 0 for a ratio to mean something."""
        return self.sigmas >= JUDGED_SIGMAS


def ratio_draws(means: F64) -> F64:
    """Return float64 [B] ratios of [B, 2] paired means; infinite where the second is not above 0.

    A draw without an excess of the baseline counts as the worst for us, never as a good one.
    """
    ours, baseline = means.T
    ratios = np.full(len(means), np.inf)
    np.divide(ours, baseline, out=ratios, where=baseline > 0)
    return ratios


def ratio_interval(
    numerator: F64, denominator: F64, *, seed: int = 0, resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float] | None:  # fmt: skip
    """Return the two-sided interval of sum(numerator) / sum(denominator), float64 [C] each.

    Both are sums over whole documents, which are resampled in pairs.

    Returns:
        None with fewer than 5 documents, which say nothing about others, or where a draw's
        denominator is not above 0.
    """
    if len(numerator) < _LEAST_CLUSTERS:
        return None
    sums = ClusterSums(np.ones(len(numerator)), np.column_stack([numerator, denominator]))
    draws = ratio_draws(resampled_means(sums, seed=seed, resamples=resamples))
    return interval(draws, level) if np.isfinite(draws).all() else None


def estimate_ratio(
    ours: npt.ArrayLike,
    baseline: npt.ArrayLike,
    documents: npt.ArrayLike,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Ratio:
    """Estimate the ratio of two excesses (each policy minus exact) over the same [N] tokens.

    Raises:
        ConfigError: as `cluster_sums`.
    """
    sums = cluster_sums(np.column_stack([ours, baseline]), documents)
    draws = ratio_draws(resampled_means(sums, seed=seed, resamples=resamples))
    low, high = interval(draws, level)
    own, other = sums.means
    error = float(sums.standard_errors()[1])
    return Ratio(
        value=float(ratio_draws(sums.means[None])[0]),
        low=low,
        high=high,
        upper=upper_bound(draws, level),
        ours=float(own),
        baseline=float(other),
        sigmas=_in_errors(float(other), error),
        documents=len(sums.counts),
        tokens=sums.tokens,
    )


def _in_errors(mean: float, error: float) -> float:
    """Return how many standard errors a mean is from 0; infinite where it has no error."""
    if mean == 0:
        return 0.0
    return mean / error if error > 0 else math.copysign(math.inf, mean)


@dataclass(frozen=True, slots=True)
class Worst:
    """The greatest of several domains' figures.

    Attributes:
        domain: The domain where the figure is greatest.
        value: The figure there.
        upper: One-sided upper bound of the maximum: each draw resamples every domain and keeps
            its greatest. Noise pushes a maximum up, so this bound is on the safe side.
        uppers: One-sided upper bound of each domain by itself.
    """

    domain: str
    value: float
    upper: float
    uppers: dict[str, float]


def worst_of(
    values: Mapping[str, float], draws: Mapping[str, F64], *, level: float = LEVEL
) -> Worst:
    """Return the worst domain, given each one's figure and its bootstrap draws [B].

    The draws of different domains must come from different seeds: domains share no document.

    Raises:
        ConfigError: no domain, or the two mappings or the draws' lengths differ.
    """
    if not values or set(values) != set(draws):
        raise ConfigError(f"domains {sorted(values)} and draws for {sorted(draws)} differ")
    if len({len(each) for each in draws.values()}) > 1:
        raise ConfigError("every domain needs the same number of draws")
    domain = max(values, key=lambda name: values[name])
    most = np.max(np.stack([draws[name] for name in values]), axis=0)
    uppers = {name: upper_bound(draws[name], level) for name in values}
    return Worst(domain, values[domain], upper_bound(most, level), uppers)


def worst_mean(
    domains: Mapping[str, ClusterSums],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Worst:
    """Return the domain with the greatest mean; each has one quantity ([C, 1] sums)."""
    return _worst(domains, lambda means: means[:, 0], seed, resamples, level)


def worst_ratio(
    domains: Mapping[str, ClusterSums],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Worst:
    """Return the domain with the greatest ratio; sums are [C, 2], ours and the baseline's."""
    return _worst(domains, ratio_draws, seed, resamples, level)


def _worst(
    domains: Mapping[str, ClusterSums], figure: Callable[[F64], F64], seed: int, resamples: int,
    level: float,
) -> Worst:  # fmt: skip
    """Return the worst domain by a figure [B] of means [B, M], with draws of its own for each."""
    draws = {
        name: figure(resampled_means(sums, seed=_seed(seed, i), resamples=resamples))
        for i, (name, sums) in enumerate(domains.items())
    }
    values = {name: float(figure(sums.means[None])[0]) for name, sums in domains.items()}
    return worst_of(values, draws, level=level)


def _seed(seed: int, domain: int) -> int:
    """Return a domain's own seed."""
    return int(np.random.SeedSequence([seed, domain]).generate_state(1)[0])
