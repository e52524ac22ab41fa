from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_vocab import small_tokenizer

from fomoe.engine.requests import TokenEvent
from fomoe.server.choices import ChoiceText
from fomoe.server.text import Finder, ThinkSplitter

LETTERS = st.text("ab<>/\n", max_size=30)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@given(
    LETTERS,
    st.lists(st.integers(0, 30), max_size=6),
    st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3),
)
def test_what_is_shown_is_the_text_before_a_match(
    text: str, cuts: list[int], wanted: list[str]
) -> None:
    finder = Finder(wanted)
    shown = ""
    for piece in pieces_of(text, cuts):
        shown += finder.push(piece)
        assert text.startswith(shown)
        assert not any(one in shown for one in wanted)
        if finder.match:
            assert finder.match in wanted
            assert text.startswith(shown + finder.match + finder.rest)
            return
        # Nothing that begins a wanted string has been shown.
        assert not any(
            shown.endswith(one[:size]) and text[len(shown) :].startswith(one[size:])
            for one in wanted
            for size in range(1, len(one))
        )
        assert len(shown) + finder.n_held <= len(text)
    assert not any(one in text for one in wanted)
    assert shown + finder.finish() == text


def test_no_more_is_held_back_than_needed() -> None:
    finder = Finder(["STOP", "ENDING"])
    assert finder.push("say ST") == "say "
    assert finder.push("ART EN") == "START "
    assert finder.n_held == 2
    assert finder.push("D, ") == "END, "
    assert finder.n_held == 0
    assert finder.push("now STOP it") == "now "
    assert (finder.match, finder.rest) == ("STOP", " it")


def split(text: str, cuts: list[int], *, inside: bool) -> tuple[str, str]:
    splitter = ThinkSplitter(inside=inside)
    parts = [splitter.push(piece) for piece in pieces_of(text, cuts)]
    parts.append(splitter.finish())
    return "".join(p[0] for p in parts), "".join(p[1] for p in parts)


@pytest.mark.parametrize(
    ("text", "inside", "thinking", "content"),
    [
        ("why\n</think>\n\nso", True, "why", "so"),
        ("a\n\nb\n</think>c\n", True, "a\n\nb", "c\n"),
        ("\nnever ends\n", True, "never ends", ""),
        ("</think>\n\nso </think> it", True, "", "so </think> it"),
        ("<think>\nwhy\n</think>\n\nso", False, "why", "so"),
        ("\n <think>why</think>so", False, "why", "so"),
        ("so <think>x</think>", False, "", "so <think>x</think>"),
        ("  <thin", False, "", "  <thin"),
        ("\n\nso\n", False, "", "\n\nso\n"),
        ("", True, "", ""),
    ],
)
@given(cuts=st.lists(st.integers(0, 40), max_size=8))
def test_thinking_is_split_off(
    text: str, inside: bool, thinking: str, content: str, cuts: list[int]
) -> None:
    assert split(text, cuts, inside=inside) == (thinking, content)


@given(LETTERS, LETTERS, st.lists(st.integers(0, 60), max_size=6))
def test_where_the_pieces_end_makes_no_difference(a: str, b: str, cuts: list[int]) -> None:
    text = f"{a}</think>{b}"
    for inside in (False, True):
        assert split(text, cuts, inside=inside) == split(text, [], inside=inside)


def said(text: str, **options: object) -> tuple[str, list[int], ChoiceText]:
    """Feed a text token by token; returns its content, the tokens handed on, and the choice."""
    tokenizer = small_tokenizer()
    choice = ChoiceText(0, tokenizer.stream(skip_special=True), **options)  # type: ignore[arg-type]
    content, tokens = "", []
    for token in tokenizer.encode_special(text):
        delta = choice.push(TokenEvent(request_id="r", token=token))
        content += delta.content
        tokens += [event.token for event in delta.tokens]
        if delta.stopped:
            break
        shown = tokenizer.decode(tokens, skip_special=True).rstrip("\ufffd")
        assert options.get("thinking") or content.startswith(shown)
    rest = choice.finish()
    return content + rest.content, tokens + [event.token for event in rest.tokens], choice


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_every_token_is_handed_on_once(text: str) -> None:
    tokenizer = small_tokenizer()
    content, tokens, choice = said(text, stops=["\n", "qq"])
    cut = min(
        (
            at
            for stop in ("\n", "qq")
            if (at := tokenizer.decode(tokenizer.encode_special(text), True).find(stop)) >= 0
        ),
        default=None,
    )
    ids = tokenizer.encode_special(text)
    assert tokens == ids[: len(tokens)]
    if cut is None:
        assert tokens == ids
        assert choice.stopped is False
    assert content == tokenizer.decode(ids, skip_special=True)[:cut]


def test_a_token_that_is_cut_by_a_stop_is_kept_and_later_ones_are_not() -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer.encode("in the on")
    assert [tokenizer.decode([i]) for i in ids] == ["in", " the", " on"]
    content, tokens, choice = said("in the on", stops=["he o"])
    assert (content, tokens, choice.stopped) == ("in t", ids[:2], True)
    content, tokens, _ = said("in the on", stops=[" the"])
    assert (content, tokens) == ("in", ids[:1])


def test_stops_wait_for_the_least_number_of_tokens() -> None:
    assert said("ab ab ab", stops=["ab"], min_tokens=1)[0] == ""
    content, _, choice = said("c, c, c, c", stops=["c"], min_tokens=4)
    assert (content, choice.stopped) == ("c, ", True)


def test_stops_do_not_apply_to_thinking() -> None:
    thinking = ThinkSplitter(inside=True)
    content, _, choice = said("stop</think>\n\nso stop it", stops=["stop"], thinking=thinking)
    assert content == "so "
    assert choice.stopped
    assert 0 < choice.n_reasoning < choice.n_tokens
