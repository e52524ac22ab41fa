"""The tables that `fomoe eval quality` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fomoe.evaluation.closed_loop import EXACT, Cost, Results
from fomoe.evaluation.pareto import ParetoPoint
from fomoe.evaluation.statistics import Estimate
from fomoe.evaluation.summary import PolicyFigures, read_bytes, total_cost

_HEAD = ("mode", "read/token", "reads", "subst.", "ΔNLL (95 %)", "PPL", "KL", "over null", "top-1")
_PART_HEAD = ("mode", "part", "tokens", "ΔNLL (95 %)", "KL", "top-1")
_CAUSE_HEAD = ("MB per token", "demand", "background", "prefetch", "shadow", "logical")
_WORST_HEAD = ("mode", "worst domain", "its figure", "bound of the worst", "of")
_DRIFT_HEAD = ("mode", "texts that differ", "shared tokens", "NLL in exact mode - exact texts'")
_RATIO_HEAD = ("mode", "excess over the baseline's (95 %)", "one-sided bound", "baseline's excess")


def tables(results: Results, figures: dict[str, PolicyFigures], beside: ParetoPoint | None) -> str:
    """Return what was measured as text for people; `beside` is exact mode against a reference."""
    exact = results.runs[EXACT]
    tokens = sum(len(run.scores.kl) for run in exact)
    nll = sum(float(run.scores.exact_nll.sum()) for run in exact) / tokens
    parts = [
        f"{len(exact)} documents, {tokens:,} scored tokens; exact mode {nll:.4f} nats per token, "
        f"perplexity {math.exp(nll):.3f}",
        _main(total_cost(exact), figures),
        _causes({EXACT: total_cost(exact)} | {spec: each.cost for spec, each in figures.items()}),
    ]
    if figures:
        parts.append(_parts(figures))
    if any(each.drift is not None for each in figures.values()):
        parts.append(_drift(figures))
    if any(each.ratio is not None for each in figures.values()):
        parts.append(_ratios(figures))
    if any(each.worst is not None for each in figures.values()):
        parts.append(_worst(figures))
    if beside is not None:
        loss = beside.excess
        parts.append(
            f"{beside.name} in exact mode, against the reference: ΔNLL {loss.mean:+.4f} "
            f"[{loss.low:.4f}, {loss.high:.4f}], {beside.read.total:,.0f} bytes read per token"
        )
    return "\n\n".join(parts)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _main(exact: Cost, figures: dict[str, PolicyFigures]) -> str:
    rows: list[Sequence[str]] = [_HEAD, (EXACT, *_cost(exact), "0", "", "0", "", "")]
    for spec, each in figures.items():
        over = each.kl_over_null
        rows.append(
            (
                spec,
                *_cost(each.cost),
                _interval(each.excess),
                f"{math.expm1(each.excess.mean):+.2%}",
                f"{each.kl.mean:.4f}",
                "" if over is None else f"{over.mean:.4f}",
                f"{each.top1:.1%}",
            )
        )
    return aligned(rows)


def _cost(cost: Cost) -> tuple[str, str, str]:
    activations = max(cost.activations, 1)
    return (
        f"{read_bytes(cost).total / 1e6:,.3f} MB",
        f"{cost.reads / activations:.1%}",
        f"{cost.substituted / activations:.1%}",
    )


def _causes(costs: dict[str, Cost]) -> str:
    rows: list[Sequence[str]] = [_CAUSE_HEAD]
    for spec, cost in costs.items():
        read = read_bytes(cost)
        amounts = (read.demand, read.background, read.prefetch, read.shadow)
        logical = "" if spec == EXACT else f"{cost.logical_bytes / max(cost.steps, 1) / 1e6:,.3f}"
        rows.append((spec, *(f"{amount / 1e6:,.3f}" for amount in amounts), logical))
    return aligned(rows)


def _worst(figures: dict[str, PolicyFigures]) -> str:
    rows: list[Sequence[str]] = [_WORST_HEAD]
    for spec, each in figures.items():
        for worst, of in ((each.worst, "ΔNLL"), (each.worst_ratio, "the ratio")):
            if worst is not None:
                row = (spec, worst.domain, f"{worst.value:.4f}", f"{worst.upper:.4f}", of)
                rows.append(row)
    return aligned(rows)


def _parts(figures: dict[str, PolicyFigures]) -> str:
    rows: list[Sequence[str]] = [_PART_HEAD]
    rows += [
        (
            spec,
            name,
            f"{part.excess.tokens:,}",
            _interval(part.excess),
            f"{part.kl.mean:.4f}",
            f"{part.top1:.1%}",
        )
        for spec, each in figures.items()
        for name, part in (each.segments | each.domains).items()
    ]
    return aligned(rows)


def _drift(figures: dict[str, PolicyFigures]) -> str:
    rows: list[Sequence[str]] = [_DRIFT_HEAD]
    for spec, each in figures.items():
        if (drift := each.drift) is not None:
            rows.append(
                (
                    spec,
                    f"{drift.diverged:.0%}",
                    f"{drift.shared_tokens:.1f} of {drift.tokens}",
                    _interval(drift.excess),
                )
            )
    return aligned(rows)


def _ratios(figures: dict[str, PolicyFigures]) -> str:
    rows: list[Sequence[str]] = [_RATIO_HEAD]
    for spec, each in figures.items():
        if (ratio := each.ratio) is not None:
            rows.append(
                (
                    spec,
                    f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
                    f"{ratio.upper:.3f}",
                    f"{ratio.sigmas:.1f} s.e." + ("" if ratio.is_judged else ", not judged"),
                )
            )
    return aligned(rows)


def _interval(estimate: Estimate) -> str:
    return (
        f"{estimate.mean:+.4f} ± {estimate.standard_error:.4f} "
        f"[{estimate.low:.4f}, {estimate.high:.4f}]"
    )
