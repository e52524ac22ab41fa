"""Figures of a closed loop: per policy, by segment, with what it read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import numpy.typing as npt

from fomoe.evaluation.closed_loop import EXACT, Cost, FreeText, Results, Run, first_difference
from fomoe.evaluation.divergence import TokenScores
from fomoe.evaluation.pareto import Measured, ParetoPoint, ReadBytes
from fomoe.evaluation.parts import (
    PartFigures,
    Scored,
    domain_figures,
    segment_figures,
    worst_domain,
)
from fomoe.evaluation.statistics import Estimate, Ratio, Worst, estimate_mean, estimate_ratio


@dataclass(frozen=True, slots=True)
class Drift:
    """Free-running texts against exact mode's from the same prompts.

    Attributes:
        diverged: Share of documents whose text differs from exact mode's.
        shared_tokens: Mean number of tokens before the first difference.
        tokens: Tokens of each text.
        nll: Mean surprise of the policy's texts under exact mode.
        excess: The same minus that of exact mode's texts, paired by document; above 0 where the
            policy says what exact mode finds less likely.
    """

    diverged: float
    shared_tokens: float
    tokens: int
    nll: float
    excess: Estimate


@dataclass(frozen=True, slots=True)
class PolicyFigures:
    """What a policy lost and read, all paired with exact mode on the same tokens.

    Attributes:
        excess: NLL minus exact mode's, nats per token.
        median_excess: Median over tokens of the same.
        kl: KL(exact || policy).
        kl_p99: Its 99th percentile over tokens.
        top1: Share of tokens with the same likeliest token.
        null_excess: The count-matched null's excess.
        null_kl: The null's KL.
        kl_over_null: KL minus the null's, paired; what the policy's choice adds to the noise.
        segments: By name; only those that have tokens of two documents.
        domains: By name, where there are several.
        worst: The domain with the greatest excess.
        ratio: Excess over that of the baseline policy, where one was named.
        worst_ratio: The domain where that ratio is greatest.
        drift: Free-running texts, where they were asked for.
        cost: What its decode steps ran and read.
    """

    excess: Estimate
    median_excess: float
    kl: Estimate
    kl_p99: float
    top1: float
    null_excess: Estimate | None
    null_kl: Estimate | None
    kl_over_null: Estimate | None
    segments: dict[str, PartFigures]
    domains: dict[str, PartFigures]
    worst: Worst | None
    ratio: Ratio | None
    worst_ratio: Worst | None
    drift: Drift | None
    cost: Cost


def joined(runs: Sequence[Run]) -> Scored:
    """Return the scored tokens of all runs, one behind the other."""
    lengths = [len(run.scores.kl) for run in runs]
    return Scored(
        scores=TokenScores.joined([run.scores for run in runs]),
        documents=np.repeat([run.document for run in runs], lengths),
        domains=np.repeat([run.domain for run in runs], lengths),
        steps=np.concatenate([np.arange(length) for length in lengths]),
    )


def total_cost(runs: Sequence[Run]) -> Cost:
    """Return what all runs read together."""
    return reduce(add, (run.cost for run in runs))


def summarise(
    results: Results, spec: str, *, baseline: str | None = None, seed: int = 0
) -> PolicyFigures:
    """Return a policy's figures.

    Args:
        results: A closed loop's.
        spec: The policy's text.
        baseline: The policy that its excess is set against.
        seed: Of the bootstrap.
    """
    runs = results.runs[spec]
    scored = joined(runs)
    scores, documents = scored.scores, scored.documents
    null = joined(results.nulls[spec]).scores if spec in results.nulls else None

    def mean(values: npt.NDArray[np.float64]) -> Estimate:
        return estimate_mean(values, documents, seed=seed)

    ratio = worst_ratio = None
    if baseline is not None and baseline != spec:
        other = joined(results.runs[baseline]).scores
        ratio = estimate_ratio(scores.excess, other.excess, documents, seed=seed)
        worst_ratio = worst_domain(scored, other, seed)
    return PolicyFigures(
        excess=mean(scores.excess),
        median_excess=float(np.median(scores.excess)),
        kl=mean(scores.kl),
        kl_p99=float(np.quantile(scores.kl, 0.99)),
        top1=float(scores.agrees.mean()),
        null_excess=None if null is None else mean(null.excess),
        null_kl=None if null is None else mean(null.kl),
        kl_over_null=None if null is None else mean(scores.kl - null.kl),
        segments=segment_figures(scored, seed),
        domains=domain_figures(scored, seed),
        worst=worst_domain(scored, None, seed),
        ratio=ratio,
        worst_ratio=worst_ratio,
        drift=_drift(results.texts, spec, seed) if results.texts else None,
        cost=total_cost(runs),
    )


def _drift(texts: dict[str, list[FreeText]], spec: str, seed: int) -> Drift:
    exact, own = texts[EXACT], texts[spec]
    shared = [first_difference(a.tokens, b.tokens) for a, b in zip(exact, own, strict=True)]
    differs = [a.tokens != b.tokens for a, b in zip(exact, own, strict=True)]
    # Texts may end early, so a document counts by its mean and not token by token.
    change = [float(b.nll.mean() - a.nll.mean()) for a, b in zip(exact, own, strict=True)]
    return Drift(
        diverged=float(np.mean(differs)),
        shared_tokens=float(np.mean(shared)),
        tokens=max(len(text.tokens) for text in exact),
        nll=float(np.mean([text.nll.mean() for text in own])),
        excess=estimate_mean(change, [text.document for text in own], seed=seed),
    )


def read_bytes(cost: Cost) -> ReadBytes:
    """Return the bytes that one decode step read, by cause."""
    steps = max(cost.steps, 1)
    return ReadBytes(
        demand=cost.demand_bytes / steps,
        background=cost.background_bytes / steps,
        prefetch=cost.prefetch_bytes / steps,
        shadow=cost.shadow_bytes / steps,
    )


def measured(estimate: Estimate) -> Measured:
    """Return an estimate's mean and interval; the interval is widened to hold the mean."""
    return Measured(
        mean=estimate.mean,
        low=min(estimate.low, estimate.mean),
        high=max(estimate.high, estimate.mean),
    )


def pareto_point(spec: str, figures: PolicyFigures) -> ParetoPoint:
    """Return a policy as a point: its series is the rule's name, its name the text."""
    null = figures.null_kl
    return ParetoPoint(
        name=spec,
        series=spec.partition("=")[0],
        read=read_bytes(figures.cost),
        excess=measured(figures.excess),
        kl=measured(figures.kl),
        null_kl=None if null is None else measured(null),
        top1=figures.top1,
        documents=figures.excess.documents,
        tokens=figures.excess.tokens,
    )
