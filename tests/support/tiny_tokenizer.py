"""A small byte-level BPE vocabulary and ChatML template for test models."""

from __future__ import annotations

from itertools import product
from typing import Any

import gguf

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def byte_letters() -> list[str]:
    """The printable stand-in of each byte 0..255 (GPT-2's byte-level alphabet)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [letters[b] for b in range(256)]


def tokenizer_json(vocab: int) -> dict[str, Any]:
    """A `tokenizer.json` of exactly `vocab` ids: 256 bytes, merges of letters, three specials last.

    Needs 259 <= vocab <= 18511. Token i < 256 is the byte i.
    """
    n_merges = vocab - 256 - len(SPECIALS)
    pairs = ["".join(p) for p in product(LETTERS, repeat=2)]
    triples = [pair + letter for pair, letter in product(pairs, LETTERS)]
    if not 0 <= n_merges <= len(pairs) + len(triples):
        raise ValueError(f"a test vocabulary of {vocab} ids cannot be made")
    merged = [*pairs, *triples][:n_merges]
    tokens = [*byte_letters(), *merged]
    return {
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [f"{token[:-1]} {token[-1]}" for token in merged],
        },
        "added_tokens": [
            {"id": len(tokens) + i, "content": text, "special": True}
            for i, text in enumerate(SPECIALS)
        ],
    }


def add_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    """Write the vocabulary, its special ids and the chat template into a GGUF header."""
    data = tokenizer_json(vocab)
    tokens = [*data["model"]["vocab"], *SPECIALS]
    kinds = [gguf.TokenType.NORMAL] * (vocab - len(SPECIALS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(tokens)
    writer.add_token_types([*kinds, *[gguf.TokenType.CONTROL] * len(SPECIALS)])
    writer.add_token_merges(data["model"]["merges"])
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_chat_template(CHATML)
