"""The small vocabulary of tests/tokenizer/golden.json as GGUF metadata."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from support.fake_gguf import metadata_of

from fomoe.model.tokenizer import Tokenizer

_PATH = Path(__file__).parents[1] / "tokenizer" / "golden.json"
GOLDEN: dict[str, Any] = json.loads(_PATH.read_text())
END_OF_TEXT, IM_START, IM_END, THINK, END_THINK = range(384, 389)
PADDING = 391


def small_values(**changes: Any) -> dict[str, Any]:
    """Metadata values; `changes` replace keys below `tokenizer.ggml.`, None drops one."""
    values = {
        "model": "gpt2",
        "pre": "qwen35",
        "tokens": GOLDEN["tokens"],
        "token_type": GOLDEN["token_type"],
        "merges": GOLDEN["merges"],
        "eos_token_id": IM_END,
        "bos_token_id": END_OF_TEXT,
        "add_bos_token": False,
    } | changes
    return {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}


@cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(metadata_of(small_values()))
