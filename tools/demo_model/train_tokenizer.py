"""Train the demo model's byte-level BPE tokenizer, with Qwen3.5's pre-tokenizer.

    python tools/demo_model/train_tokenizer.py corpus.txt.xz tokenizer.json

The corpus is text (optionally .xz) with documents separated by `<|endoftext|>`.
"""

from __future__ import annotations

import argparse
import lzma
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCAB_SIZE = 8192
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
QWEN35_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_text(path: Path) -> str:
    """Text of a plain or .xz file."""
    raw = path.read_bytes()
    return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")


def documents(text: str) -> Iterator[str]:
    """Documents of a corpus without their separators; empty ones are left out."""
    return (doc for doc in (part.strip("\n") for part in text.split(END_OF_TEXT)) if doc)


def build_tokenizer() -> Tokenizer:
    """An untrained tokenizer: NFC, Qwen3.5's split, bytes, BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN35_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(text: str) -> Tokenizer:
    """Train to exactly VOCAB_SIZE tokens, the special ones last."""
    tokenizer = build_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    plain = text.replace("<|im_start|>", "\n").replace("<|im_end|>", "\n")
    tokenizer.train_from_iterator(documents(plain), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"{tokenizer.get_vocab_size()} tokens, wanted {VOCAB_SIZE}")
    return tokenizer


def main() -> None:
    """Train on the corpus named on the command line and save tokenizer.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    train(read_text(args.corpus)).save(str(args.output))


if __name__ == "__main__":
    main()
