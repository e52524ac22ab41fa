"""Which documents teach the lab model, which ones tune a policy's constants, which are scored.

A document's part follows from the hash of its text, so that the split is the same everywhere and
can be checked: `part_of`. WikiText-2's test set is scored as a whole and never tunes anything.
"""

from __future__ import annotations

import hashlib
import lzma
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

Part = Literal["train", "tune", "score", "unused"]
Domain = Literal["articles", "chat", "prose", "wikitext"]
SEPARATOR = "<|endoftext|>"
# Of a thousand documents of a domain: how many tune and how many are scored. Prose has few
# documents, most of them long.
_PER_MILLE = {"articles": (25, 60), "chat": (40, 120), "prose": (60, 120), "wikitext": (0, 0)}
_TITLE = re.compile(r"([^\n]{1,100})\n\n")
_ARTICLE = re.compile(r"^ = [^=].* = $", re.MULTILINE)


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Windows of equal length that are decoded side by side.

    Attributes:
        ids: int64 [S, T], token ids.
        documents: int64 [S], the document that each came from: the cluster of its tokens.
        domains: the domain of each.
    """

    ids: np.ndarray
    documents: np.ndarray
    domains: list[Domain]


def domain_of(text: str) -> Domain:
    """Return the domain of a document of the training mix, from its look."""
    if text.startswith("<|im_start|>"):
        return "chat"
    if " @-@ " in text or " @,@ " in text:
        return "wikitext"
    title = _TITLE.match(text)
    if title:
        word = title.group(1).split("(")[0].split()[0].lower()
        if word in text[title.end() : title.end() + 400].lower():
            return "articles"
    return "prose"


def part_of(text: str) -> Part:
    """Return what a document of the training mix is for; two in ten articles are left out."""
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 1000
    domain = domain_of(text)
    tune, score = _PER_MILLE[domain]
    if draw < tune:
        return "tune"
    if draw < tune + score:
        return "score"
    return "unused" if domain == "articles" and draw >= 800 else "train"


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of a text file, plain or .xz."""
    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    return (doc for doc in (part.strip("\n") for part in text.split(SEPARATOR)) if doc)


def wikitext_articles(path: Path) -> list[str]:
    """Return the articles of WikiText-2's raw test file."""
    text = path.read_text(encoding="utf-8")
    starts = [m.start() for m in _ARTICLE.finditer(text)]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def cut(
    documents: Iterable[str], domain: Domain, tokenizer: Tokenizer, length: int, most: int
) -> Windows:
    """Cut documents into windows of `length` tokens, at most `most`, spread over the documents.

    Short chat documents are joined, each followed by the separator; a window is then a cluster of
    its own. Otherwise a window lies inside one document, and its rest is left out.
    """
    end = tokenizer.token_to_id(SEPARATOR)
    encoded = [[*e.ids, end] for e in tokenizer.encode_batch_fast(list(documents))]
    if domain == "chat":
        encoded = [[i for ids in encoded for i in ids]]
    rows = [
        (number, ids[start : start + length])
        for number, ids in enumerate(encoded)
        for start in range(0, len(ids) - length + 1, length)
    ]
    if len(rows) > most:
        keep = np.linspace(0, len(rows) - 1, most).round().astype(int)
        rows = [rows[i] for i in keep]
    numbers = range(len(rows)) if domain == "chat" else [number for number, _ in rows]
    ids = np.array([ids for _, ids in rows], dtype=np.int64).reshape(len(rows), length)
    return Windows(ids, np.array(list(numbers), dtype=np.int64), [domain] * len(rows))


def join(parts: list[Windows]) -> Windows:
    """Stack windows of several domains; documents get numbers of their own."""
    documents, first = [], 0
    for part in parts:
        documents.append(part.documents + first)
        first += int(part.documents.max(initial=-1)) + 1
    return Windows(
        np.concatenate([p.ids for p in parts]),
        np.concatenate(documents),
        [d for p in parts for d in p.domains],
    )
