"""The tables that `fomoe eval quality` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fomoe.evaluation.closed_loop import EXACT, Cost, Results
from fomoe.evaluation.pareto import ParetoPoint
from fomoe.evaluation.statistics import Estimate
from fomoe.evaluation.summary import PolicyFigures, total_cost

_HEAD = ("mode", "read/token", "reads", "subst.", "ΔNLL (95 %)", "PPL", "KL", "over null", "top-1")
_SEGMENT_HEAD = ("mode", "segment", "tokens", "ΔNLL (95 %)", "KL", "top-1")
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
    ]
    if figures:
        parts.append(_segments(figures))
    if any(each.drift is not None for each in figures.values()):
        parts.append(_drift(figures))
    if any(each.ratio is not None for each in figures.values()):
        parts.append(_ratios(figures))
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
    total = cost.demand_bytes + cost.background_bytes + cost.prefetch_bytes + cost.shadow_bytes
    activations = max(cost.activations, 1)
    return (
        f"{total / max(cost.steps, 1) / 1e6:,.3f} MB",
        f"{cost.reads / activations:.1%}",
        f"{cost.substituted / activations:.1%}",
    )


def _segments(figures: dict[str, PolicyFigures]) -> str:
    rows: list[Sequence[str]] = [_SEGMENT_HEAD]
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
        for name, part in each.segments.items()
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
