from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe.cli.logits import parse_tokens
from fomoe.errors import ConfigError


def test_the_array_is_written_and_described(
    fomoe: Callable[..., Any], llm: Any, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "no-suffix"
    result = fomoe("logits", model, "--tokens", "1, 2,250", "--output", output, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"output": str(output), "shape": [3, 256]}
    array = np.load(output)
    assert array.dtype == np.float32
    assert array.argmax(axis=1).tolist() == [2, 3, 251]


def test_what_cannot_be_written_is_named(fomoe: Callable[..., Any], llm: Any, model: Path) -> None:
    result = fomoe("logits", model, "--tokens", "1", "--output", "/dev/full")
    assert isinstance(result.exception, ConfigError)
    assert "/dev/full: cannot be written (No space left on device)" in str(result.exception)


def test_the_context_grows_with_the_tokens(
    fomoe: Callable[..., Any], llm: Any, model: Path, tmp_path: Path
) -> None:
    tokens = ",".join(["7"] * 100)
    fomoe("logits", model, "--tokens", tokens, "--output", tmp_path / "x", "--ctx-size", 10)
    assert llm.last.arguments["ctx_size"] == 100


@pytest.mark.parametrize("text", ["", "1,,2", "a", "-1", "1.5", "²"])
def test_what_is_no_token_id_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a token id"):
        parse_tokens(text)
