"""The real Qwen3.5 tokenizer and chat template, where a copy lies beside the checkout."""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.fake_gguf import metadata_of
from tokenizers import Tokenizer as Reference

from fomoe.model.chat import ChatTemplate
from fomoe.model.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
VOCABULARY = DATA / "qwen35" / "tokenizer.json.xz"
TEMPLATE = DATA / "qwen35" / "chat_template_Qwen3.5-4B.jinja"

needs_qwen = pytest.mark.skipif(not VOCABULARY.exists(), reason="no copy of Qwen3.5's tokenizer")


@cache
def reference() -> Reference:
    return Reference.from_str(lzma.decompress(VOCABULARY.read_bytes()).decode())


@cache
def qwen() -> tuple[Tokenizer, ChatTemplate]:
    """Build both from metadata as a converter writes it."""
    data = json.loads(lzma.decompress(VOCABULARY.read_bytes()))
    vocab: dict[str, int] = data["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__) + [a["content"] for a in data["added_tokens"]]
    types = [1] * len(vocab) + [3 if a["special"] else 4 for a in data["added_tokens"]]
    padding = [f"[PAD{i}]" for i in range(len(tokens), 248320)]
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35",
        "tokenizer.ggml.tokens": tokens + padding,
        "tokenizer.ggml.token_type": types + [5] * len(padding),
        "tokenizer.ggml.merges": data["model"]["merges"],
        "tokenizer.ggml.eos_token_id": 248046,
        "tokenizer.ggml.bos_token_id": 248044,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE.read_text(),
    }
    metadata = metadata_of(values)
    tokenizer = Tokenizer.from_gguf(metadata)
    return tokenizer, ChatTemplate.from_gguf(metadata, tokenizer)
