"""Figures of parts of what was scored: segments of a text by decode step, domains by file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.evaluation.divergence import TokenScores
from fomoe.evaluation.segments import SEGMENTS
from fomoe.evaluation.statistics import (
    Estimate,
    Worst,
    cluster_sums,
    estimate_mean,
    worst_mean,
    worst_ratio,
)

F64 = npt.NDArray[np.float64]
Names = npt.NDArray[np.str_]


@dataclass(frozen=True, slots=True)
class PartFigures:
    """A part of the scored tokens; nats per token."""

    excess: Estimate
    kl: Estimate
    top1: float


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """All of a mode's scored tokens.

    Attributes:
        scores: [N] each.
        documents: str [N], the document of each token.
        domains: str [N], the file that it came from.
        steps: int64 [N], its decode step from 0.
    """

    scores: TokenScores
    documents: Names
    domains: Names
    steps: npt.NDArray[np.int64]


def part_figures(scored: Scored, inside: npt.NDArray[np.bool_], seed: int) -> PartFigures:
    """Return the figures of the tokens [N] inside a part of two documents or more."""
    of = scored.documents[inside]
    return PartFigures(
        excess=estimate_mean(scored.scores.excess[inside], of, seed=seed),
        kl=estimate_mean(scored.scores.kl[inside], of, seed=seed),
        top1=float(scored.scores.agrees[inside].mean()),
    )


def segment_figures(scored: Scored, seed: int) -> dict[str, PartFigures]:
    """Return figures by segment; only those that have tokens of two documents."""
    masks = {segment.name: segment.mask(scored.steps) for segment in SEGMENTS}
    return {
        name: part_figures(scored, mask, seed)
        for name, mask in masks.items()
        if len(np.unique(scored.documents[mask])) > 1
    }


def domain_figures(scored: Scored, seed: int) -> dict[str, PartFigures]:
    """Return figures by domain, each of two documents or more; empty where there is only one."""
    names = domain_names(scored)
    if len(names) < 2:
        return {}
    return {name: part_figures(scored, scored.domains == name, seed) for name in names}


def worst_domain(scored: Scored, baseline: TokenScores | None, seed: int) -> Worst | None:
    """Return the domain with the greatest excess, or ratio of excesses where a baseline is given.

    None where there is only one domain.
    """
    names = domain_names(scored)
    if len(names) < 2:
        return None
    columns = [scored.scores.excess]
    if baseline is not None:
        columns.append(baseline.excess)
    values = np.column_stack(columns)
    sums = {
        name: cluster_sums(values[scored.domains == name], scored.documents[scored.domains == name])
        for name in names
    }
    return (worst_mean if baseline is None else worst_ratio)(sums, seed=seed)


def domain_names(scored: Scored) -> list[str]:
    """Return the domains in the order of their first tokens."""
    return list(dict.fromkeys(scored.domains.tolist()))
