"""Multiple-choice questions and last words, answered by likelihood."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError
from fomoe.evaluation.accuracy import McNemar, mcnemar
from fomoe.evaluation.statistics import Estimate, estimate_mean
from fomoe.evaluation.texts import document


@dataclass(frozen=True, slots=True)
class Question:
    """A query and its possible continuations; one choice alone is a last word to be guessed.

    Attributes:
        name: Hash of the query, which also decides its part of the split (`texts`).
        is_tuning: Whether constants may be fixed on it.
        query: Without white space at its end.
        choices: Each is joined to the query by a space.
        gold: Index of the right one.
    """

    name: str
    is_tuning: bool
    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True, slots=True)
class Continuation:
    """One choice in tokens.

    Attributes:
        prefix: Exact prompt, at least one token.
        forced: The rest of the query and the choice, fed one by one.
        scored: How many of them, from the end, are the choice.
        text_bytes: UTF-8 bytes of the choice, by which its likelihood is normalised.
    """

    prefix: list[int]
    forced: list[int]
    scored: int
    text_bytes: int


@dataclass(frozen=True, slots=True)
class Said:
    """What a mode thought of one continuation's choice.

    Attributes:
        logprob: Sum of the log probabilities of its tokens, nats.
        is_greedy: Whether each of them was the likeliest.
    """

    logprob: float
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """One mode's answer to one question."""

    right: bool
    gold_logprob: float


@dataclass(frozen=True, slots=True)
class ChoiceFigures:
    """Accuracy of a policy against exact mode, paired by question.

    Attributes:
        accuracy: McNemar's counts and test.
        gold_change: log p of the right choice, policy minus exact mode, nats per question.
    """

    accuracy: McNemar
    gold_change: Estimate


def parse_questions(lines: Iterable[str]) -> list[Question]:
    """Return the questions of JSON lines.

    `{"query": ..., "choices": [...], "gold": index}` is a multiple choice; of `{"text": ...}` the
    last word is to be guessed (LAMBADA).

    Raises:
        ConfigError: a line is neither; names it.
    """
    questions = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                questions.append(_question(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"line {number} is no question: {error!r}") from None
    return questions


def _question(row: dict[str, Any]) -> Question:
    choices: tuple[str, ...]
    if "text" in row:
        text, _, word = str(row["text"]).strip().rpartition(" ")
        query, choices, gold = text.strip(), (word,), 0
    else:
        query, gold = str(row["query"]).strip(), int(row["gold"])
        choices = tuple(str(choice).strip() for choice in row["choices"])
    if not query or not all(choices) or not 0 <= gold < len(choices):
        raise ValueError(f"query of {len(query)} characters, choice {gold} of {len(choices)}")
    of = document(query)
    return Question(of.name, of.is_tuning, query, choices, gold)


def continuations(
    question: Question, encode: Callable[[str], list[int]], decoded: int
) -> list[Continuation]:
    """Return the choices in tokens.

    The policy never acts in a prompt, and an exact prompt predicts a choice's first token. So the
    last `decoded` tokens of the query are fed one by one like the choice, as if the model had
    written them; at least one token stays in the prompt.
    """
    query = encode(question.query)
    split = max(1, len(query) - decoded)
    found = []
    for choice in question.choices:
        target = encode(f" {choice}")
        size = len(choice.encode())
        found.append(Continuation(query[:split], query[split:] + target, len(target), size))
    return found


def answered(question: Question, rows: Sequence[Continuation], said: Sequence[Said]) -> Answer:
    """Return whether the right choice has the greatest log probability per byte.

    At equal figures the first one wins. A last word must be the likeliest token by token.
    """
    gold = said[question.gold]
    if len(rows) == 1:
        return Answer(gold.is_greedy, gold.logprob)
    scores = [each.logprob / row.text_bytes for each, row in zip(said, rows, strict=True)]
    return Answer(int(np.argmax(scores)) == question.gold, gold.logprob)


def compare_answers(
    questions: Sequence[Question], exact: Sequence[Answer], policy: Sequence[Answer]
) -> ChoiceFigures:
    """Return the figures of both modes' answers to the same questions, two at least."""
    change: npt.NDArray[np.float64] = np.array(
        [b.gold_logprob - a.gold_logprob for a, b in zip(exact, policy, strict=True)]
    )
    return ChoiceFigures(
        accuracy=mcnemar([a.right for a in exact], [b.right for b in policy]),
        gold_change=estimate_mean(change, [question.name for question in questions]),
    )
