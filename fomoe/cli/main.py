"""The verbs of `fomoe`, and how errors end it."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from fomoe.cli.bench import bench
from fomoe.cli.evaluate import ppl
from fomoe.cli.logits import logits
from fomoe.cli.options import flattened
from fomoe.cli.plan import plan
from fomoe.cli.replay import replay
from fomoe.cli.run import run
from fomoe.cli.serve import serve
from fomoe.cli.show import show
from fomoe.cli.stop import stop
from fomoe.config import environment
from fomoe.errors import ConfigError, FomoeError

USAGE_ERROR = 2


def make_app() -> typer.Typer:
    """Return the command line with all verbs."""
    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Runs mixture-of-experts models that are larger than VRAM + RAM.",
    )
    app.callback()(_before_any_verb)
    for verb in (serve, run, show, plan, logits, bench, replay, stop):
        app.command()(flattened(verb))
    evaluation = typer.Typer(no_args_is_help=True, help="Measure a model's quality.")
    evaluation.callback()(_evaluation)
    evaluation.command()(flattened(ppl))
    app.add_typer(evaluation, name="eval")
    return app


def main() -> None:
    """Run the command line and exit: 0, 1 for a failure, 2 for a wrong option."""
    try:
        make_app()()
    except FomoeError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(USAGE_ERROR if isinstance(error, ConfigError) else 1)


def _evaluation() -> None:
    """Keep `ppl` a verb of its own under `eval`."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fomoe {version('fomoe')}")
        raise typer.Exit


def _before_any_verb(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    # Variables stand in for options that are not given; each verb takes those that it knows.
    values = environment()
    names = ("serve", "run", "show", "plan", "logits", "bench", "replay", "stop")
    verbs = dict.fromkeys(names, values)
    context.default_map = {**verbs, "eval": {"ppl": values}}
