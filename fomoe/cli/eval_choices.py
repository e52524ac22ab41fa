"""`fomoe eval choices`: accuracy on multiple-choice sets, exact mode and policies paired."""

from __future__ import annotations

import dataclasses
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from fomoe.cli.eval_options import measuring, policies
from fomoe.cli.eval_table import aligned
from fomoe.cli.forcing import ModelRunner
from fomoe.cli.opening import opened, progress_bar
from fomoe.cli.options import EngineOptions, ModelOptions
from fomoe.errors import ConfigError
from fomoe.evaluation.choices import (
    Answer,
    ChoiceFigures,
    Continuation,
    Question,
    answered,
    compare_answers,
    continuations,
    parse_questions,
)
from fomoe.evaluation.closed_loop import EXACT, Mode
from fomoe.evaluation.texts import Part

_HEAD = ("set", "questions", "policy", "exact", "policy's", "lost", "won", "p", "log p of gold")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceOptions:
    """Which questions are answered, under which policies."""

    data: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="JSON lines, .xz or plain; may be given several times."),
    ]
    policy: Annotated[
        str, typer.Option(metavar="LIST", help="Contracts with commas: car=0.35,price=0.05.")
    ] = ""
    questions: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="At most this many of each file.")
    ] = None
    decoded: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Last tokens of a query that are decoded like the choice, as if the model had "
            "written them; the policy does not act in the prompt before them.",
        ),
    ] = 32
    part: Annotated[
        Part, typer.Option(help="Questions to take: constants are fixed on those that tune.")
    ] = "score"
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False

    def load(self) -> dict[str, list[Question]]:
        """Return the questions by file name; ConfigError where a file cannot be used."""
        found: dict[str, list[Question]] = {}
        for path in self.data:
            if path.name in found:
                raise ConfigError(f"two sets are called {path.name}, which names them; rename one")
            try:
                every = parse_questions(_lines(path))
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
            own = [q for q in every if self.part == "all" or q.is_tuning == (self.part == "tune")]
            if len(own[: self.questions]) < 2:
                raise ConfigError(f"{path}: {len(own)} questions of part {self.part}, 2 are needed")
            found[path.name] = own[: self.questions]
        return found


def choices(model: ModelOptions, engine: EngineOptions, asked: ChoiceOptions) -> None:
    """Answer questions by the likelihood of each choice per byte, in exact mode and under policies.

    Of LAMBADA's texts the last word must be the likeliest. McNemar's exact test compares the
    questions that only one of both modes answers rightly.
    """
    specs = policies(asked.policy)
    sets = asked.load()
    with opened(model, measuring(engine)) as llm, progress_bar() as progress:
        task = progress.add_task("answering", total=sum(map(len, sets.values())))
        runner = ModelRunner(llm)
        figures: dict[str, dict[str, ChoiceFigures]] = {}
        for name, questions in sets.items():
            rows = [continuations(each, llm.tokenizer.encode, asked.decoded) for each in questions]
            said = _answers(runner, questions, rows, specs, lambda: progress.advance(task))
            figures[name] = {
                spec: compare_answers(questions, said[EXACT], said[spec])
                for spec in (specs or [EXACT])
            }
    if asked.as_json:
        plain = {
            name: {spec: dataclasses.asdict(each) for spec, each in by_spec.items()}
            for name, by_spec in figures.items()
        }
        typer.echo(json.dumps({"decoded": asked.decoded, "sets": plain}))
    else:
        typer.echo(_table(figures))


def _answers(
    runner: ModelRunner,
    questions: Sequence[Question],
    rows: Sequence[list[Continuation]],
    specs: Sequence[str],
    on_question: Callable[[], None],
) -> dict[str, list[Answer]]:
    found: dict[str, list[Answer]] = {spec: [] for spec in (EXACT, *specs)}
    for question, own in zip(questions, rows, strict=True):
        for spec, answers in found.items():
            said = [runner.say(row, Mode(spec)) for row in own]
            answers.append(answered(question, own, said))
        on_question()
    return found


def _lines(path: Path) -> list[str]:
    try:
        if path.suffix == ".xz":
            with lzma.open(path, "rt", encoding="utf-8") as file:
                return list(file)
        return path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line ends
    except (OSError, UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ConfigError(f"cannot be read: {error}") from None


def _table(figures: dict[str, dict[str, ChoiceFigures]]) -> str:
    rows: list[Sequence[str]] = [_HEAD]
    for name, by_spec in figures.items():
        for spec, each in by_spec.items():
            pairs, gold = each.accuracy, each.gold_change
            rows.append(
                (
                    name,
                    f"{pairs.questions:,}",
                    spec,
                    f"{pairs.exact:.2%}",
                    f"{pairs.policy:.2%} ± {pairs.standard_error:.2%}",
                    f"{pairs.lost}",
                    f"{pairs.won}",
                    f"{pairs.p_value:.3f}",
                    f"{gold.mean:+.4f} [{gold.low:.4f}, {gold.high:.4f}]",
                )
            )
    return aligned(rows)
