"""Scores of policies as figures for machines and for people."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.evaluation.statistics import ratio_interval
from fomoe.sim.bounds import Uses, knapsack, relaxed
from fomoe.sim.losses import LOSSES
from fomoe.sim.replay import Score
from fomoe.traces import Trace

Floats = npt.NDArray[np.float64]
_HEAD = (
    "capacity", "policy", "demand", "back", "MB/token", "subst", "drop", "lost mass", "left out",
    "lost w2", "router KL", "of the gap",
)  # fmt: skip


def figures_of(score: Score, trace: Trace) -> dict[str, Any]:
    """Return a score's figures: over all, by layer, by domain.

    `demand`, `background`, `substituted` and `dropped` are shares of the picks; losses are means
    per token and layer; bytes are per token.
    """
    domains = np.array([text.domain for text in trace.sequences])
    by_domain = {
        str(domain): _figures(score, trace, domains == domain) for domain in np.unique(domains)
    }
    by_layer = [
        _shares({name: score.sums(name)[:, layer].sum() for name in _NAMES})
        for layer in range(trace.facts.n_layers)
    ]
    return {
        "policy": score.policy.text,
        "capacity": score.capacity,
        **_figures(score, trace, np.ones(len(domains), np.bool_)),
        "by_domain": by_domain,
        "by_layer": by_layer,
    }


_SHOWN = ("lost_mass", "left_out", "lost_squares", "router_kl")
_NAMES = ("tokens", "wanted", "demand", "background", "substituted", "dropped", *LOSSES)


def _figures(score: Score, trace: Trace, texts: npt.NDArray[np.bool_]) -> dict[str, Any]:
    tokens = float(score.sums("tokens")[texts, 0].sum())
    size = np.array(trace.facts.expert_bytes, np.float64)
    per_token = {
        f"{cause}_bytes": float((score.sums(cause)[texts] * size).sum()) / max(tokens, 1.0)
        for cause in ("demand", "background")
    }
    sums = {name: score.sums(name)[texts].sum() for name in _NAMES}
    return {"tokens": int(tokens), **per_token, **_shares(sums)}


def _shares(sums: dict[str, Any]) -> dict[str, float]:
    wanted, rows = max(float(sums["wanted"]), 1.0), max(float(sums["tokens"]), 1.0)
    causes = {name: float(sums[name]) / wanted for name in _NAMES[2:6]}
    return causes | {name: float(sums[name]) / rows for name in LOSSES}


def gap_of(score: Score, lru: Score, optimum: Score) -> dict[str, Any]:
    """Return how much of the way from LRU to the offline optimum an exact policy goes.

    `share` is (LRU's reads - its own) / (LRU's - the optimum's), `points` what it reads less than
    LRU in percent of the picks; both over all scored tokens, with 95 % intervals over texts.
    """
    own, worst, best = (each.sums("demand").sum(axis=1) for each in (score, lru, optimum))
    wanted = score.sums("wanted").sum(axis=1)
    saved, gap = worst - own, worst - best
    return {
        "share": float(saved.sum() / gap.sum()) if gap.sum() else 0.0,
        "share_interval": ratio_interval(saved, gap),
        "points": 100 * float(saved.sum()) / max(float(wanted.sum()), 1.0),
        "points_interval": ratio_interval(100 * saved, wanted),
    }


def bounds_of(score: Score, layers: list[Uses]) -> dict[str, Any]:
    """Return what a policy's bytes must leave out, as `left_out` and `lost_squares`: see `bounds`.

    Args:
        score: its demand and background bytes over all scored tokens are the budget.
        layers: the uses of all texts and layers, at the score's capacity.
    """
    reads = score.sums("demand") + score.sums("background")
    n_layers = reads.shape[1]
    size = np.array([layer.expert_bytes for layer in layers[:n_layers]], np.float64)
    budget, rows = float((reads * size).sum()), max(float(score.sums("tokens").sum()), 1.0)
    return {
        name: {
            "left_out": bound(layers, budget, 1) / rows,
            "lost_squares": bound(layers, budget, 2) / rows,
        }
        for name, bound in (("belady_knapsack", knapsack), ("relaxed_optimum", relaxed))
    }


def table_of(results: list[dict[str, Any]]) -> list[str]:
    """Return the figures as lines of a table, bounds under the policies whose bytes they have."""
    rows: list[tuple[str, ...]] = [_HEAD]
    for each in results:
        rows += [_cells(each), *(_bound_cells(*item) for item in each.get("bounds", {}).items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]


def _cells(figures: dict[str, Any]) -> tuple[str, ...]:
    per_token = (figures["demand_bytes"] + figures["background_bytes"]) / 1e6
    gap = figures.get("gap")
    return (
        str(figures["capacity"]), figures["policy"],
        *(f"{100 * figures[name]:.2f} %" for name in ("demand", "background")),
        f"{per_token:.1f}",
        *(f"{100 * figures[name]:.2f} %" for name in ("substituted", "dropped")),
        *(f"{figures[name]:.4f}" for name in _SHOWN),
        "" if gap is None else _gap_cell(gap),
    )  # fmt: skip


def _bound_cells(name: str, losses: dict[str, float]) -> tuple[str, ...]:
    values = {9: f"{losses['left_out']:.4f}", 10: f"{losses['lost_squares']:.4f}"}
    cells = ["", name.replace("_", " "), *(values.get(i + 1, "") for i in range(2, len(_HEAD)))]
    return tuple(cells)


def _gap_cell(gap: dict[str, Any]) -> str:
    text = f"{100 * gap['share']:.1f} %"
    interval = gap["share_interval"]
    return (
        text if interval is None else f"{text} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    )
