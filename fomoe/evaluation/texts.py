"""Documents of a text, which of them tune and which are scored, and windows of tokens.

**The split.** A document belongs to the tuning part when the first byte of the SHA-256 of its UTF-8
text, white space at its ends removed, is below 64: a quarter. Every constant of a policy (a price,
a threshold, a layer's sensitivity) is fixed on tuning documents; what is reported comes from the
others. The rule knows nothing but the document's own text, so it is the same in every file, order
and program, and a document that occurs twice cannot be on both sides.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fomoe.errors import ConfigError

Part = Literal["tune", "score", "all"]
TUNING_BYTES = 64

_END_OF_TEXT = "<|endoftext|>"
# WikiText writes an article's title as " = Title = " on its own line, sections with more signs.
_WIKI_TITLE = re.compile(r"^ = [^=\n].*[^=\n] = $", re.MULTILINE)
# White space only between two documents, more lines than within one.
_GAP = re.compile(r"\n\s*\n\s*\n")


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is independent of the others.

    Attributes:
        name: First 12 hex digits of the SHA-256 of its text; the label of its cluster.
        text: Without white space at its ends.
        is_tuning: Whether constants may be fixed on it.
    """

    name: str
    text: str
    is_tuning: bool


def document(text: str) -> Document:
    """Return a text as a document with its part of the split."""
    text = text.strip()
    digest = hashlib.sha256(text.encode()).digest()
    return Document(digest.hex()[:12], text, digest[0] < TUNING_BYTES)


def split_documents(text: str) -> list[Document]:
    """Return the documents of a file: each once, empty ones left out, in order.

    They are separated by `<|endoftext|>` where it occurs, else by WikiText's title lines (a title
    begins its article), else by two and more empty lines, else the text is one document.
    """
    if _END_OF_TEXT in text:
        parts = text.split(_END_OF_TEXT)
    elif _WIKI_TITLE.search(text):
        starts = [match.start() for match in _WIKI_TITLE.finditer(text)]
        bounds = [0, *starts, len(text)]
        parts = [text[a:b] for a, b in pairwise(bounds)]
    else:
        parts = _GAP.split(text)
    documents = {each.name: each for each in map(document, parts) if each.text}
    return list(documents.values())


def of_part(documents: Iterable[Document], part: Part) -> list[Document]:
    """Return the documents of one part of the split."""
    return [each for each in documents if part == "all" or each.is_tuning == (part == "tune")]


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens of one document: an exact prompt, then what is decoded.

    Attributes:
        document: The document's name, label of its cluster.
        domain: The kind of text, by the file that it came from.
        prefix: Prompt, at least one token.
        forced: Tokens that are fed one by one. The first is not scored, because the exact prompt
            predicts it in every mode; each of the others is, by the step that its predecessor took.
    """

    document: str
    domain: str
    prefix: list[int]
    forced: list[int]


def windows(
    documents: Sequence[Document],
    encode: Callable[[str], list[int]],
    *,
    prefix: int,
    scored: int,
    limit: int | None = None,
    domain: str = "",
) -> list[Window]:
    """Return the first window of each document that is long enough, at most `limit` of them.

    One window per document keeps clusters alike; more tokens come from longer windows.

    Args:
        documents: In the order in which they are taken.
        encode: Tokenizer, no tokens added.
        prefix: Tokens of the prompt, at least 1.
        scored: Scored tokens, at least 1.
        limit: None takes all.
        domain: What all of these documents are.

    Raises:
        ConfigError: fewer than two documents are long enough.
    """
    if prefix < 1 or scored < 1:
        raise ConfigError(f"a prefix of {prefix} and {scored} scored tokens: give 1 and more")
    found: list[Window] = []
    for each in documents:
        if limit is not None and len(found) >= limit:
            break
        ids = encode(each.text)
        if len(ids) > prefix + scored:
            found.append(Window(each.name, domain, ids[:prefix], ids[prefix : prefix + scored + 1]))
    if len(found) < 2:
        raise ConfigError(
            f"{len(found)} of {len(documents)} documents have {prefix + scored + 1} tokens, 2 are "
            "needed; shorten --prefix or --scored, or give more text"
        )
    return found
