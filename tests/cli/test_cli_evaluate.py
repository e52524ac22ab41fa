from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe.cli.evaluate import perplexity, scored_positions
from fomoe.errors import ConfigError


def test_the_second_half_of_a_window_is_scored() -> None:
    positions = scored_positions(512)
    assert (positions[0], positions[-1], len(positions)) == (256, 510, 255)


def test_windows_start_afresh_and_the_rest_is_left_out() -> None:
    windows: list[list[int]] = []

    def uniform(window: list[int]) -> Any:
        windows.append(window)
        return np.zeros((len(window), 10), np.float32)

    ids = [ord(c) % 10 for c in "a b\nc d e\nf g h i"]
    result = perplexity(ids, 8, uniform, lambda token: b"w " if token % 2 else b"x\n")
    assert windows == [ids[:8], ids[8:16]]
    assert (result.chunks, result.tokens) == (2, 6)
    figures = result.figures()
    assert figures["token_ppl"] == pytest.approx(10)
    scored = [*ids[5:8], *ids[13:16]]
    assert result.text_bytes == 12
    assert result.words == 6 + sum(token % 2 == 0 for token in scored)
    assert figures["word_ppl"] == pytest.approx(10 ** (6 / result.words))
    assert figures["bits_per_byte"] == pytest.approx(6 * math.log2(10) / 12)


def test_the_scored_token_is_the_next_one() -> None:
    def copies(window: list[int]) -> Any:
        logits = np.full((len(window), 100), -50.0, np.float32)
        logits[np.arange(len(window)), np.array(window) + 1] = 50.0
        return logits

    result = perplexity(list(range(64)), 16, copies, lambda token: b".")
    assert result.figures()["token_ppl"] == pytest.approx(1.0)


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="7 tokens, fewer than one window of 8"):
        perplexity([1] * 7, 8, lambda ids: np.zeros((8, 2), np.float32), lambda token: b"")


def test_the_verb_prints_json(
    fomoe: Callable[..., Any], llm: Any, model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 112)))
    arguments = ("eval", "ppl", model, "--text", text, "--ctx", "16", "--json")
    result = fomoe(*arguments)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["chunks"] == 5
    assert figures["tokens"] == 35
    assert figures["token_ppl"] == pytest.approx(1 + 255 / math.e)
    assert json.loads(fomoe(*arguments, "--chunks", 2).stdout)["chunks"] == 2
    assert llm.last.arguments["ctx_size"] == 4096
    assert "token_ppl" in fomoe(*arguments[:-1]).stdout


def test_a_text_that_is_none_is_refused(
    fomoe: Callable[..., Any], llm: Any, model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"\xff\xfe")
    result = fomoe("eval", "ppl", model, "--text", text)
    assert isinstance(result.exception, ConfigError)
    assert "cannot be read" in str(result.exception)
