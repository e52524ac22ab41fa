from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fomoe.errors import EngineError, RequestError


def test_a_prompt_is_answered(fomoe: Callable[..., Any], llm: Any, model: Path) -> None:
    result = fomoe("run", model, "-p", "hi", "--system", "be", "--seed", 5, "--top-k", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout == "hö\n"
    (request,) = llm.last.engine.asked
    assert bytes(request.prompt) == b"system:be|user:hi"
    assert (request.sampling.seed, request.sampling.top_k) == (5, 3)
    assert request.stop_ids == frozenset({0})
    assert request.max_tokens == 64 - len(request.prompt)
    assert llm.last.engine.closed == 1
    assert not llm.last.is_open


def test_the_tier_line_follows_on_stderr(fomoe: Callable[..., Any], llm: Any, model: Path) -> None:
    result = fomoe("run", model, "-p", "hi")
    assert "tok/s" in result.stderr
    assert "tok/s" not in result.stdout


def test_raw_text_is_continued_without_a_template(
    fomoe: Callable[..., Any], llm: Any, model: Path
) -> None:
    assert fomoe("run", model, "-p", "Once", "--raw", "--max-tokens", 1).stdout == "h\n"
    assert bytes(llm.last.engine.asked[0].prompt) == b"Once"


def test_json_has_the_receipt(fomoe: Callable[..., Any], llm: Any, model: Path) -> None:
    answer = json.loads(fomoe("run", model, "-p", "hi", "--json").stdout)
    assert answer["text"] == "hö"
    assert answer["token_ids"] == [0x68, 0xC3, 0xB6]
    assert answer["finish_reason"] == "stop"
    assert answer["receipt"]["generated_tokens"] == 3


def test_a_chat_keeps_the_conversation(fomoe: Callable[..., Any], llm: Any, model: Path) -> None:
    result = fomoe("run", model, input="one\n\ntwo\n")
    assert result.exit_code == 0, result.output
    prompts = [bytes(request.prompt).decode() for request in llm.last.engine.asked]
    assert prompts == ["user:one", "user:one|assistant:hö|user:two"]
    assert result.stdout.count("hö") == 2


def test_a_chat_survives_a_refused_turn(fomoe: Callable[..., Any], llm: Any, model: Path) -> None:
    result = fomoe("run", model, input=f"{'x' * 100}\nok\n")
    assert result.exit_code == 0, result.output
    assert "105 tokens and the context 64" in " ".join(result.stderr.split())
    assert [bytes(each.prompt) for each in llm.last.engine.asked] == [b"user:ok"]


def test_a_failing_engine_is_an_error(fomoe: Callable[..., Any], llm: Any, model: Path) -> None:
    llm.prepare = lambda self: setattr(self.engine, "failure", "device 0 has died")
    result = fomoe("run", model, "-p", "hi")
    assert isinstance(result.exception, EngineError)
    assert str(result.exception) == "device 0 has died"
    too_long = fomoe("run", model, "-p", "x" * 100)
    assert isinstance(too_long.exception, RequestError)


def test_json_needs_a_prompt(fomoe: Callable[..., Any], llm: Any, model: Path) -> None:
    result = fomoe("run", model, "--json", env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "--raw and --json need --prompt" in result.output
