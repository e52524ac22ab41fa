"""Reads the vocabulary of a GGUF file and builds the BPE over its plain tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fomoe.gguf.metadata import Metadata

MAX_TOKENS = 1 << 22
MAX_TOKEN_CHARS = 4096

# How text is cut into words before BPE, by `tokenizer.ggml.pre`; the expressions are part of the
# vocabularies' format (the `pre_tokenizer` of Qwen3.5's and Qwen2's tokenizer.json).
PATTERNS = {
    "qwen35": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

_TOKENS = "tokenizer.ggml.tokens"
_MERGES = "tokenizer.ggml.merges"
_TYPES = "tokenizer.ggml.token_type"


class TokenType(IntEnum):
    """What a token is (`tokenizer.ggml.token_type` of the GGUF specification)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for.

    Bytes that print stand for themselves, the others are numbered from U+0100 (GPT-2's encoder).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


BYTE_OF = byte_alphabet()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model.

    Attributes:
        tokens: Text of each token by id; byte-level for plain ones.
        special: Id of each special text (control and user-defined tokens).
        control: Ids of the control tokens.
        bpe: Turns plain text into ids of plain tokens.
    """

    tokens: list[str]
    special: dict[str, int]
    control: frozenset[int]
    bpe: Backend


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Read and check the vocabulary of a model file.

    Raises:
        GGUFError: the vocabulary is of another kind, damaged or contradicts itself.
    """
    model = metadata.str("tokenizer.ggml.model")
    if model != "gpt2":
        metadata.refuse("tokenizer.ggml.model", f"{model!r} is not supported, only 'gpt2' is")
    tokens = metadata.strings(_TOKENS)
    _check_tokens(metadata, tokens)
    types = _token_types(metadata, len(tokens))
    special: dict[str, int] = {}
    plain: dict[str, int] = {}
    for token_id, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            _add_once(metadata, special, text, token_id)
        elif kind == TokenType.NORMAL:
            _add_once(metadata, plain, text, token_id)
    control = frozenset(i for i, kind in enumerate(types) if kind == TokenType.CONTROL)
    return Vocabulary(tokens, special, control, _bpe(metadata, plain))


def _check_tokens(metadata: Metadata, tokens: Sequence[str]) -> None:
    if not 0 < len(tokens) <= MAX_TOKENS:
        metadata.refuse(_TOKENS, f"{len(tokens):,} tokens are outside 1 to {MAX_TOKENS:,}")
    for token_id, text in enumerate(tokens):
        if not 0 < len(text) <= MAX_TOKEN_CHARS:
            metadata.refuse(
                _TOKENS,
                f"token {token_id:,} has {len(text):,} characters, 1 to {MAX_TOKEN_CHARS:,} are "
                "allowed",
            )


def _token_types(metadata: Metadata, n_tokens: int) -> list[int]:
    if _TYPES not in metadata:
        return [TokenType.NORMAL] * n_tokens
    types: list[int] = metadata.ints(_TYPES).tolist()
    if len(types) != n_tokens:
        metadata.refuse(_TYPES, f"{len(types):,} types for {n_tokens:,} tokens")
    return types


def _add_once(metadata: Metadata, table: dict[str, int], text: str, token_id: int) -> None:
    first = table.setdefault(text, token_id)
    if first != token_id:
        metadata.refuse(_TOKENS, f"tokens {first:,} and {token_id:,} are both {text[:40]!r}")


def _bpe(metadata: Metadata, vocab: dict[str, int]) -> Backend:
    """Build NFC, split, byte-level alphabet and BPE over the plain tokens."""
    pre = metadata.str("tokenizer.ggml.pre")
    if pre not in PATTERNS:
        known = ", ".join(sorted(PATTERNS))
        metadata.refuse("tokenizer.ggml.pre", f"{pre!r} is not supported, known are {known}")
    missing = sum(char not in vocab for char in BYTE_OF)
    if missing:
        metadata.refuse(_TOKENS, f"{missing} of the 256 byte tokens are missing")
    bpe = Backend(models.BPE(vocab=vocab, merges=_merges(metadata, vocab)))
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return bpe


def _merges(metadata: Metadata, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for rank, line in enumerate(metadata.strings(_MERGES)):
        left, space, right = line.partition(" ")
        if not space or " " in right:
            metadata.refuse(_MERGES, f"merge {rank:,} is {line[:80]!r}, not two tokens")
        for token in (left, right, left + right):
            if token not in vocab:
                metadata.refuse(
                    _MERGES, f"merge {rank:,} needs {token[:80]!r}, which is no plain token"
                )
        merges.append((left, right))
    return merges
