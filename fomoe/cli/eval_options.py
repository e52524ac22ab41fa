"""Options that the verbs under `fomoe eval` share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from fomoe.cli.options import EngineOptions
from fomoe.errors import ConfigError
from fomoe.evaluation.closed_loop import EXACT
from fomoe.evaluation.texts import Part
from fomoe.quality import parse_quality


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """Which texts are decoded, under which policies."""

    text: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE", help="UTF-8 text; each file is a domain, several may be given."
        ),
    ]
    policy: Annotated[
        str, typer.Option(metavar="LIST", help="Contracts with commas: car=0.35,price=0.05.")
    ] = ""
    prefix: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of exact prompt.")] = 64
    scored: Annotated[int, typer.Option(metavar="N", min=1, help="Scored tokens after it.")] = 64
    documents: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="At most this many documents of each text."),
    ] = None
    part: Annotated[
        Part, typer.Option(help="Documents to take: constants are fixed on those that tune.")
    ] = "score"
    free: Annotated[
        int, typer.Option(metavar="N", min=0, help="Tokens of free-running text per document.")
    ] = 0
    null: Annotated[bool, typer.Option(help="Run the count-matched null of each policy.")] = True

    @property
    def specs(self) -> list[str]:
        """The policies."""
        return policies(self.policy)

    @property
    def ctx_size(self) -> int:
        """Tokens that one sequence must be able to hold."""
        return self.prefix + max(self.scored + 1, self.free)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """What becomes of the figures."""

    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where results and plots go; made if new.")
    ] = None
    baseline: Annotated[
        str | None, typer.Option(metavar="CONTRACT", help="Set every excess against this one's.")
    ] = None
    reference: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Results of another file of this model: pair exact mode."),
    ] = None
    points: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="pareto.json of other runs, drawn into the same plot."),
    ] = None
    seed: Annotated[int, typer.Option(metavar="N", help="Of the bootstrap.")] = 0
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False

    def prepare(self) -> None:
        """Make the folder of the results; ConfigError where that cannot be done."""
        if self.output is None:
            return
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--output {self.output} cannot be made: {error}") from None


def measuring(engine: EngineOptions, ctx_size: int = 0) -> EngineOptions:
    """Return the options of an engine that is measured: room for `ctx_size`, no shadow steps.

    Raises:
        ConfigError: the engine has a contract of its own, which nothing here would be held to.
    """
    if engine.quality is not None or engine.car is not None:
        raise ConfigError(
            "--quality and --car hold for answers; here policies are named with --policy LIST of "
            "`fomoe eval quality` or `fomoe eval choices`, and all else is exact"
        )
    return replace(engine, ctx_size=max(engine.ctx_size, ctx_size), shadow_every=0)


def policies(text: str) -> list[str]:
    """Return the contracts of a list with commas in their canonical text, each once.

    Raises:
        ConfigError: one of them is not understood, or is exact mode.
    """
    specs = [str(parse_quality(part)) for part in text.split(",") if part.strip()]
    if EXACT in specs:
        raise ConfigError("exact mode is always run; name policies only")
    return list(dict.fromkeys(specs))
