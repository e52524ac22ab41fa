"""`fomoe eval quality`: what a policy loses and reads against exact mode, on the real engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from fomoe.cli.eval_options import LoopOptions, ReportOptions, measuring
from fomoe.cli.eval_table import tables
from fomoe.cli.forcing import ModelRunner
from fomoe.cli.opening import opened, progress_bar
from fomoe.cli.options import EngineOptions, ModelOptions
from fomoe.errors import ConfigError
from fomoe.evaluation.closed_loop import EXACT, Results, closed_loop, free_running
from fomoe.evaluation.pareto import Measured, ParetoPoint, read_points, to_json
from fomoe.evaluation.plot import save_pareto
from fomoe.evaluation.statistics import Estimate
from fomoe.evaluation.summary import (
    PolicyFigures,
    measured,
    pareto_point,
    read_bytes,
    summarise,
    total_cost,
)
from fomoe.evaluation.texts import Document, Window, of_part, split_documents, windows
from fomoe.evaluation.tokens import TokenTable
from fomoe.quality import parse_quality

TOKENS, POINTS, FIGURES, PLOT = "tokens.npz", "pareto.json", "figures.json", "pareto"


def quality(
    model: ModelOptions, engine: EngineOptions, loop: LoopOptions, report: ReportOptions
) -> None:
    """Measure policies in the closed loop: exact prompt, then the text's own tokens one by one.

    The policy acts at each decoded token; exact mode does the same on the same tokens. Intervals
    resample documents. Shadow steps are off except where a contract needs them.
    """
    baseline = _baseline(loop.specs, report.baseline)
    found = {name: of_part(each, loop.part) for name, each in _documents(loop.text).items()}
    earlier = None if report.reference is None else _earlier(report.reference)
    others = [point for path in report.points or () for point in read_points(path)]
    engine = measuring(engine, loop.ctx_size)
    report.prepare()
    with opened(model, engine) as llm:
        rows = [
            window
            for name, documents in found.items()
            for window in windows(
                documents, llm.tokenizer.encode, prefix=loop.prefix, scored=loop.scored,
                limit=loop.documents, domain=name,
            )
        ]  # fmt: skip
        results = _measure(ModelRunner(llm), rows, loop)
    figures = {
        spec: summarise(results, spec, baseline=baseline, seed=report.seed) for spec in loop.specs
    }
    table = TokenTable.of(results, rows)
    points, beside = _points(model.path.stem, results, figures), None
    if earlier is not None:
        beside = _beside(points[0], table.excess_over(earlier[0], seed=report.seed))
        points = [*earlier[1], beside]
    points += [point for point in others if point not in points]
    summary = _summary(results, figures, points)
    if report.output is not None:
        _write(report.output, table, points, summary)
    typer.echo(json.dumps(summary) if report.as_json else tables(results, figures, beside))
    if report.output is not None:  # last, because a plot needs what may not be installed
        save_pareto(points, report.output / PLOT)


def _baseline(specs: Sequence[str], text: str | None) -> str | None:
    if text is None:
        return None
    baseline = str(parse_quality(text))
    if baseline not in specs:
        raise ConfigError(f"--baseline {text} must be one of --policy {','.join(specs)}")
    return baseline


def _documents(paths: Sequence[Path]) -> dict[str, list[Document]]:
    """Return each file's documents by its name; one that occurs in several counts in the first."""
    try:
        texts = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the text cannot be read: {error}") from None
    if len(texts) < len(paths):
        raise ConfigError("two texts have the same file name, which names their domain; rename one")
    seen: set[str] = set()
    found = {}
    for name, text in texts.items():
        found[name] = [each for each in split_documents(text) if each.name not in seen]
        seen |= {each.name for each in found[name]}
    return found


def _measure(runner: ModelRunner, rows: Sequence[Window], loop: LoopOptions) -> Results:
    specs = loop.specs
    modes = 1 + len(specs) * (2 if loop.null else 1) + (1 + len(specs) if loop.free else 0)
    with progress_bar() as progress:
        task = progress.add_task("decoding", total=modes * len(rows))

        def advance() -> None:
            progress.advance(task)

        results = closed_loop(runner, rows, specs, null=loop.null, on_run=advance)
        texts = free_running(runner, rows, specs, loop.free, advance) if loop.free else {}
    return dataclasses.replace(results, texts=texts)


def _points(name: str, results: Results, figures: dict[str, PolicyFigures]) -> list[ParetoPoint]:
    """Return exact mode and every policy as points."""
    runs = results.runs[EXACT]
    exact = ParetoPoint(
        name=name,
        series=EXACT,
        read=read_bytes(total_cost(runs)),
        excess=Measured(mean=0.0, low=0.0, high=0.0),
        top1=1.0,
        documents=len(runs),
        tokens=sum(len(run.scores.kl) for run in runs),
    )
    return [exact, *(pareto_point(spec, each) for spec, each in figures.items())]


def _write(
    folder: Path, table: TokenTable, points: Sequence[ParetoPoint], summary: dict[str, Any]
) -> None:
    table.save(folder / TOKENS)
    (folder / POINTS).write_text(to_json(points), encoding="utf-8")
    (folder / FIGURES).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _earlier(folder: Path) -> tuple[TokenTable, list[ParetoPoint]]:
    """Return the tokens and points of an earlier run's folder."""
    return TokenTable.load(folder / TOKENS), read_points(folder / POINTS)


def _beside(exact: ParetoPoint, excess: Estimate) -> ParetoPoint:
    """Return this file's exact mode with its loss counted from the reference's exact mode.

    Policies are not carried over: they would need a pairing of their own.
    """
    return dataclasses.replace(
        exact, series="another file, exact", excess=measured(excess), top1=None
    )


def _summary(
    results: Results, figures: dict[str, PolicyFigures], points: Sequence[ParetoPoint]
) -> dict[str, Any]:
    exact = results.runs[EXACT]
    return {
        "exact": {
            "nll": float(sum(run.scores.exact_nll.sum() for run in exact))
            / sum(len(run.scores.kl) for run in exact),
            "cost": dataclasses.asdict(total_cost(exact)),
        },
        "policies": {spec: dataclasses.asdict(each) for spec, each in figures.items()},
        "points": json.loads(to_json(points))["points"],
    }
