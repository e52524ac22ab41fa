from __future__ import annotations

import json

import pytest

from fomoe.errors import ConfigError
from fomoe.evaluation.choices import (
    Said,
    answered,
    compare_answers,
    continuations,
    parse_questions,
)

ROW = {"query": "Goal: x\nAnswer: ", "choices": [" one ", "three"], "gold": 1}


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_both_formats_are_questions() -> None:
    choice, word = parse_questions(
        [json.dumps(ROW), "\n", json.dumps({"text": "He said the last word \n"})]
    )
    assert (choice.query, choice.choices, choice.gold) == ("Goal: x\nAnswer:", ("one", "three"), 1)
    assert (word.query, word.choices, word.gold) == ("He said the last", ("word",), 0)


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"text": "one"}', json.dumps(ROW | {"gold": 2}), json.dumps(ROW | {"gold": -1}),
     json.dumps(ROW | {"choices": ["a", " "]}), json.dumps(ROW | {"query": " "})],
)  # fmt: skip
def test_other_lines_are_named(line: str) -> None:
    with pytest.raises(ConfigError, match="line 2 is no question"):
        parse_questions([json.dumps(ROW), line])


@pytest.mark.parametrize(("decoded", "prompt"), [(0, 15), (4, 11), (14, 1), (99, 1)])
def test_the_querys_end_is_decoded_like_the_choice(decoded: int, prompt: int) -> None:
    question = parse_questions([json.dumps(ROW)])[0]
    for row, choice in zip(continuations(question, encode, decoded), question.choices, strict=True):
        assert bytes(row.prefix + row.forced).decode() == f"Goal: x\nAnswer: {choice}"
        assert len(row.prefix) == prompt
        assert bytes(row.forced[-row.scored :]).decode() == f" {choice}"
        assert row.text_bytes == len(choice)


def test_the_likeliest_per_byte_is_the_answer() -> None:
    question = parse_questions([json.dumps(ROW)])[0]
    rows = continuations(question, encode, 0)
    # -4 / 5 bytes is better than -3 / 3 bytes, though -3 is the greater sum.
    assert answered(question, rows, [Said(-3.0, True), Said(-4.0, False)]).right
    assert not answered(question, rows, [Said(-3.0, True), Said(-6.0, False)]).right
    assert answered(question, rows, [Said(-3.0, True), Said(-4.0, False)]).gold_logprob == -4.0


def test_a_last_word_must_be_greedy() -> None:
    question = parse_questions(['{"text": "the word"}'])[0]
    rows = continuations(question, encode, 0)
    assert answered(question, rows, [Said(-9.0, True)]).right
    assert not answered(question, rows, [Said(-0.1, False)]).right


def test_modes_are_paired_by_question() -> None:
    questions = parse_questions(json.dumps(ROW | {"query": f"q{i}"}) for i in range(3))
    rows = [continuations(each, encode, 0) for each in questions]
    good, bad = [Said(-9.0, False), Said(-1.0, True)], [Said(-1.0, True), Said(-9.0, False)]
    exact = [answered(q, r, good) for q, r in zip(questions, rows, strict=True)]
    policy = [exact[0], answered(questions[1], rows[1], bad), exact[2]]
    figures = compare_answers(questions, exact, policy)
    assert (figures.accuracy.lost, figures.accuracy.won) == (1, 0)
    assert figures.gold_change.mean == pytest.approx(-8 / 3)
