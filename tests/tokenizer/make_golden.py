"""Train the small vocabulary of the tokenizer tests and write golden.json beside this file.

    python tests/tokenizer/make_golden.py

The expected ids come from a `tokenizer.json` pipeline of the tokenizers library in which the
special texts are added tokens: another way through the library than fomoe takes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

# Qwen3.5's split, written out here so that a slip in the package cannot hide.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
LINES = (
    "The expert that is wanted next lies on the disk; the one that was wanted last lies in memory.",
    "It's what they'll say: we've read 1234567 bytes, and I'm sure you'd read 89 more.",
    "def route(scores, k):\n    order = sorted(scores)\n    return order[:k]\n",
    "Grüße aus Köln, naïve café, señor, Ελληνικά, русский текст, 日本語の文章, 한국어, हिन्दी.",
    "spaces   and\ttabs\t\tand\r\nlines\n\n\nand trailing   ",
)
CASES = (
    "",
    "a",
    "The expert that lies in memory",
    "It'S WE'VE they'Ll",
    "12345 67",
    "   three spaces, then  two \n\n\t end  ",
    "line\r\nline\r\n\r\n",
    "e\u0301 is é, A\u030a is Å, \u1100\u1161 is 가",
    "हिन्दी की मात्रा",
    "日本語の文章 русский",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 \U0001f9d1🏽",
    "\x00\x01\x7f\u200b\ufeff\ufffd",
    "a" * 100,
    "!!!???...\n\n((([[[{{{",
    "<|im_end|>",
    "a <|im_start|>user\nhi<|im_end|> <think>x</think><|im_end",
    "<<|im_end|>|> <|<think>|im_end|>",
)


def pipeline() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def golden() -> dict[str, Any]:
    tokenizer = pipeline()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    plain = [tokenizer.encode(text).ids for text in CASES]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in USER_DEFINED])
    return {
        "tokens": [*tokens, *CONTROL, *USER_DEFINED, "[PAD391]"],
        "token_type": [1] * len(tokens) + [3] * len(CONTROL) + [4] * len(USER_DEFINED) + [5],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "cases": [
            {"text": text, "plain": ids, "special": tokenizer.encode(text).ids}
            for text, ids in zip(CASES, plain, strict=True)
        ],
    }


if __name__ == "__main__":
    path = Path(__file__).with_name("golden.json")
    path.write_text(json.dumps(golden(), ensure_ascii=True, indent=0) + "\n")
