"""`fomoe plan`: what fits on a machine, how fast it would be, what binds and what would help."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from fomoe.cli.options import parse_size
from fomoe.config import environment
from fomoe.errors import ConfigError
from fomoe.routing import CacheAwareRouting, PriceRouting
from fomoe.sim.calibration import RECALLS, RowResult, calibrate, read_calibration
from fomoe.sim.forecast import SAMPLED_LAYERS, TOKENS, Fit, Question, Span, Twin, corners, upgrades
from fomoe.sim.loads import Rule, scores_of_rows
from fomoe.sim.machine import Machine, find_machine, machine_files
from fomoe.sim.schedule import Schedule
from fomoe.sim.shapes import SHAPES, ModelShape, shape_by_name, shape_of_file
from fomoe.traces import Trace

_PROMPTS = (512, 4096)
_TIERS = ("device", "ram", "nvme")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What is asked."""

    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="GGUF file; only its header is read.")
    ] = None
    shape: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"A model without a file: {', '.join(SHAPES)}."),
    ] = None
    machine: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"{', '.join(sorted(machine_files()))}, or a file that `fomoe bench --machine` "
            "wrote.",
        ),
    ] = "desktop"
    ctx_size: Annotated[
        int, typer.Option(metavar="TOKENS", min=1, help="Longest prompt and answer together.")
    ] = 4096
    car: Annotated[
        float,
        typer.Option(metavar="0..1", min=0.0, max=1.0, help="Cache-aware routing; 0 is exact."),
    ] = 0.0
    price: Annotated[
        float,
        typer.Option(metavar="0..1", min=0.0, max=1.0, help="Price of a read, in router mass."),
    ] = 0.0
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A recorded text of this model, for its hit rates."),
    ] = None
    vram_budget: Annotated[
        int | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="For experts, of each device."),
    ] = None
    ram_budget: Annotated[
        int | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="For experts, of each node."),
    ] = None

    def read_shape(self) -> ModelShape:
        """Return the model's sizes.

        A model that an environment variable names gives way to --shape.

        Raises:
            ConfigError: both or neither of file and name are given.
        """
        model = self.model
        if self.shape is not None and str(model) == environment().get("model"):
            model = None
        if (model is None) == (self.shape is None):
            raise ConfigError("give a model file, or --shape NAME: one of them")
        if self.shape is not None:
            return shape_by_name(self.shape)
        assert model is not None, "one of them is given"
        return shape_of_file(model)

    def read_rule(self) -> Rule | None:
        """Return the routing rule, None for the exact experts.

        Raises:
            ConfigError: two rules are asked for.
        """
        if self.car > 0 and self.price > 0:
            raise ConfigError("--car and --price are two rules: give one of them")
        if self.car > 0:
            return CacheAwareRouting(self.car)
        return PriceRouting(self.price) if self.price > 0 else None

    def rule_name(self) -> str:
        """Return the rule for people."""
        if self.car > 0:
            return f"--car {self.car:g}"
        return f"--price {self.price:g}" if self.price > 0 else "exact"

    def read_scores(self, shape: ModelShape) -> npt.NDArray[np.float32] | None:
        """Return a trace's last tokens, text by text, as router scores; None without a trace.

        Raises:
            TraceError: the trace cannot be read.
            ConfigError: it is another model's, or too short.
        """
        if self.trace is None:
            return None
        recorded = Trace.open(self.trace)
        facts = recorded.facts
        own = facts.n_layers, facts.n_experts, facts.top_k
        if own != (wanted := (shape.n_layers, shape.n_experts, shape.top_k)):
            raise ConfigError(
                f"{self.trace} is of another model: layers, experts and experts a token are {own} "
                f"there and {wanted} here"
            )
        if len(recorded) < TOKENS:
            raise ConfigError(f"{self.trace}: {len(recorded)} tokens, at least {TOKENS} are needed")
        # Texts that were answered side by side are interleaved in the file.
        last = np.concatenate([text.rows for text in recorded.sequences])[-TOKENS:]
        records = recorded.records[last]
        every = -(-shape.n_layers // SAMPLED_LAYERS)
        ids, p = (records[name][:, ::every] for name in ("ids", "probabilities"))
        return scores_of_rows(ids, p, shape.n_experts)


def plan(
    options: PlanOptions,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="Print the twin beside what was measured.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict a model on a machine: what fits, tok/s, what binds, what an upgrade would bring."""
    if calibration:
        _print_calibration(as_json)
        return
    machine, shape = find_machine(options.machine), options.read_shape()
    question = Question(
        context=options.ctx_size, rule=options.read_rule(), device_budget=options.vram_budget,
        ram_budget=options.ram_budget,
        schedule=Schedule(split="experts" if machine.nodes > 1 else "layers"),
    )  # fmt: skip
    figures = _figures(Twin(shape, question, options.read_scores(shape)), machine)
    if as_json:
        typer.echo(json.dumps(figures))
        return
    for line in _lines(figures, machine, shape, options):
        typer.echo(line)


def _figures(twin: Twin, machine: Machine) -> dict[str, Any]:
    prompts = [n for n in _PROMPTS if n <= twin.question.context]
    fit = twin.fit(machine)
    outcomes = [twin.outcome(machine, corner) for corner in corners(machine)]
    binds = outcomes[1].binds
    texts = [twin.loads(machine, fit, corner.slots).shares for corner in corners(machine)]
    offers = upgrades(machine) if twin.question.device_budget is None else {}
    return {
        "model": twin.shape.name,
        "machine": machine.name,
        "fit": dataclasses.asdict(fit),
        "predicted": {
            "hits": {tier: _around([t[i] for t in texts]) for i, tier in enumerate(_TIERS)},
            "tokens_per_s": dataclasses.asdict(twin.speed(machine)),
            "prompt_s": {n: dataclasses.asdict(twin.prompt(machine, n)) for n in prompts},
            "binds": binds,
            "binds_share": _around([outcome.share(binds) for outcome in outcomes]),
            "upgrades_tokens_per_s": {
                name: dataclasses.asdict(twin.upgrade(machine, better))
                for name, better in offers.items()
            },
        },
    }


def _around(three: list[float]) -> dict[str, float]:
    return {"low": min(three), "mid": three[1], "high": max(three)}


def _span(values: dict[str, float], pattern: str = "{:.1f}") -> str:
    low, mid, high = (pattern.format(values[key]) for key in ("low", "mid", "high"))
    return f"{mid} ({low} to {high})"


def _lines(
    figures: dict[str, Any], machine: Machine, shape: ModelShape, options: PlanOptions
) -> list[str]:
    fit, said = Fit(**figures["fit"]), figures["predicted"]
    hits = "  ".join(f"{tier} {_span(said['hits'][tier], '{:.0%}')}" for tier in _TIERS)
    rest = shape.n_experts - fit.device_slots - fit.ram_slots
    where = "devices" if machine.device.memory_bytes else "devices, in RAM"
    lines = [
        f"{shape.name} on {machine.describe()}",
        f"fits     {where} {fit.device_slots:.1f} of {shape.n_experts} experts a layer "
        f"({fit.device_bytes / 1e9:.1f} of {fit.device_total / 1e9:.1f} GB with "
        f"{shape.dense_bytes / 1e9:.1f} GB dense), RAM {fit.ram_slots:.1f} "
        f"({fit.ram_bytes / 1e9:.1f} of {fit.ram_total / 1e9:.1f} GB), NVMe {rest:.1f}",
        f"context  {options.ctx_size:,} tokens; {fit.kv_bytes / 1e6:.1f} MB of keys and values "
        "per 1,000",
        f"decode   predicted {_span(said['tokens_per_s'])} tok/s, {options.rule_name()}",
        f"hits     predicted {hits}",
        f"binds    predicted {said['binds']}, at work "
        f"{_span(said['binds_share'], '{:.0%}')} of the time",
        *(
            f"prompt   predicted {_span(span)} s to the first token of {n:,} tokens"
            for n, span in said["prompt_s"].items()
        ),
        *(
            f"upgrade  {name}: predicted {_span(span, '{:+.1f}')} tok/s"
            for name, span in said["upgrades_tokens_per_s"].items()
        ),
    ]
    bad, _, good = corners(machine)
    lines.append(
        f"ranges   recall on misses {bad.recall} to {good.recall}, drive x{bad.drive:.2f} to "
        f"{good.drive:.2f}, kernels x{bad.kernels:.2f} to {good.kernels:.2f}, own time "
        f"x{bad.software:.1f} to {good.software:.1f}, slots x{bad.slots:.2f} to {good.slots:.2f}"
    )
    if machine.device.memory_bytes:
        lines.append("note     predicted for hidden copies; on GPUs the engine hides few yet")
    return lines


def _print_calibration(as_json: bool) -> None:
    calibration = read_calibration()
    results = calibrate(calibration)
    if as_json:
        rows = [_calibration_figures(result) for result in results]
        typer.echo(json.dumps({"fitted": dataclasses.asdict(calibration.fitted), "rows": rows}))
        return
    fitted = calibration.fitted
    typer.echo(
        f"fitted, then frozen: drive_share {fitted.drive_share:.4f}, layer_s "
        f"{1e3 * fitted.layer_s:.4f} ms; tok/s throughout\n"
        f"{'row':30} {'measured':>9}  {'twin, published hit rates':28} {'off':>6}  "
        f"{'twin, own rules on a synthesised trace (device/RAM/NVMe)':57} "
        f"if a share of misses were guessed"
    )
    for result in results:
        typer.echo(_calibration_line(result))
    sources = dict(calibration.sources)
    for name in sorted({result.row.machine for result in results}):
        sources |= {f"{name}.{key}": why for key, why in find_machine(name).sources.items()}
    for key, source in sources.items():
        typer.echo(f"constant {key}: {source}")
    for result in results:
        typer.echo(f"row {result.row.name}: {result.row.source}")


def _calibration_figures(result: RowResult) -> dict[str, Any]:
    """Return a row as it was measured and, apart, as it is predicted (a fitted one says so)."""
    figures = dataclasses.asdict(result)
    row, published = figures.pop("row"), figures.pop("predicted")
    return {
        "row": row,
        "predicted": {"published_hits": published, "deviation": result.deviation, **figures},
    }


def _calibration_line(result: RowResult) -> str:
    row, low, high = result.row, *result.replayed
    measured = f"{row.measured[0]:.2f}"
    if row.measured[1] != row.measured[0]:
        measured += f"-{row.measured[1]:.2f}"
    twin = "(not published)"
    if result.predicted is not None:
        verb = "fitted" if row.role == "fitted" else "predicted"
        span = Span(*result.predicted)
        twin = f"{verb} {_span(dataclasses.asdict(span), '{:.2f}')}"
    little, much = result.guessed
    shares = "/".join(f"{100 * share:.0f}" for share in result.shares[:3])
    replayed = f"predicted {(low + high) / 2:.2f} ({low:.2f} to {high:.2f}) at {shares} %"
    return (
        f"{row.name:30} {measured:>9}  {twin:28} {result.deviation:+6.1%}  {replayed:57} "
        f"predicted ({little:.2f} at {RECALLS[0]} to {much:.2f} at {RECALLS[1]})"
    )
