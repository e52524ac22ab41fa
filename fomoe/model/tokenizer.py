"""Byte-level BPE tokenizer built from the vocabulary inside a GGUF file.

Special tokens (control and user-defined ones) live outside the BPE, so plain text cannot produce
them; only `encode_special`, meant for text that a chat template wrote, does.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable

from fomoe.errors import RequestError
from fomoe.gguf.metadata import Metadata
from fomoe.model.vocabulary import BYTE_OF, Vocabulary, read_vocabulary

END_TEXTS = ("<|im_end|>", "<|endoftext|>")


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        n_vocab: Number of token ids; every id lies in 0 .. n_vocab - 1.
        eos_ids: Tokens that end an answer.
        eos_id: The one of them that the file names first, None where it names none.
        bos_id: Token that begins a text, None where the vocabulary names none.
        add_bos: Whether a prompt begins with `bos_id`.
        special_ids: Token id of each special text.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.n_vocab = len(vocabulary.tokens)
        self.special_ids = vocabulary.special
        self.eos_ids: frozenset[int] = frozenset()
        self.eos_id: int | None = None
        self.bos_id: int | None = None
        self.add_bos = False
        self._tokens = vocabulary.tokens
        self._special_texts = {token_id: text for text, token_id in vocabulary.special.items()}
        self._control = vocabulary.control
        self._bpe = vocabulary.bpe
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @classmethod
    def from_gguf(cls, metadata: Metadata) -> Tokenizer:
        """Build the tokenizer that a model file describes.

        Raises:
            GGUFError: the vocabulary is of another kind, damaged or contradicts itself.
        """
        tokenizer = cls(read_vocabulary(metadata))
        tokenizer._read_ends(metadata)
        return tokenizer

    def _read_ends(self, metadata: Metadata) -> None:
        """Take over the ids that begin and end texts."""
        ends = {self.special_ids[text] for text in END_TEXTS if text in self.special_ids}
        named = {
            name: metadata.int(key, hi=self.n_vocab - 1)
            for name in ("eos", "eot", "bos")
            if (key := f"tokenizer.ggml.{name}_token_id") in metadata
        }
        self.eos_id, self.bos_id = named.get("eos"), named.get("bos")
        ends.update(named[name] for name in ("eos", "eot") if name in named)
        self.eos_ids = frozenset(ends)
        self.add_bos = metadata.bool("tokenizer.ggml.add_bos_token", default=False)
        if self.add_bos and self.bos_id is None:
            metadata.refuse("tokenizer.ggml.add_bos_token", "true, but the file names no BOS token")

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text; special strings in it are text like any other.

        Raises:
            RequestError: the text holds half of a surrogate pair.
        """
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _surrogate(error) from None
        # The batch call gives up the interpreter lock, the single one does not.
        return list(self._bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def encode_special(self, text: str, *, shield: str = "") -> list[int]:
        """Return the ids of text in which special strings stand for their tokens.

        Args:
            text: What a template wrote.
            shield: A character that is no part of the text: it is dropped, and a special string
                that it lies in or directly behind is plain text.
        """
        ids: list[int] = []
        start = 0
        for match in self._special_pattern.finditer(text):
            if shield and text.startswith(shield, match.end()):
                continue
            ids += self.encode(_without(text[start : match.start()], shield))
            ids.append(self.special_ids[match.group()])
            start = match.end()
        return ids + self.encode(_without(text[start:], shield))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for, the text itself for a special token.

        Raises:
            RequestError: the id is not in the vocabulary.
        """
        if not 0 <= token_id < self.n_vocab:
            raise RequestError(f"token id {token_id} is outside 0 to {self.n_vocab - 1:,}")
        text = self._tokens[token_id]
        if token_id in self._special_texts:
            return text.encode()
        try:
            return bytes([BYTE_OF[char] for char in text])
        except KeyError:
            return text.encode()

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: Token ids.
            skip_special: Leave control tokens out.
        """
        skipped: frozenset[int] = self._control if skip_special else frozenset()
        data = b"".join(self.token_bytes(token_id) for token_id in ids if token_id not in skipped)
        return data.decode("utf-8", "replace")

    def stream(self, *, skip_special: bool = False) -> TokenStream:
        """Return a decoder that takes one token at a time."""
        skipped: frozenset[int] = self._control if skip_special else frozenset()
        return TokenStream(self.token_bytes, skipped)

    def token_id(self, text: str) -> int | None:
        """Return the id of a special token, or None where the vocabulary has no such one."""
        return self.special_ids.get(text)

    def special_text(self, token_id: int | None) -> str:
        """Return the text of a special token, an empty one for None or a plain token."""
        return "" if token_id is None else self._special_texts.get(token_id, "")


class TokenStream:
    """Decodes tokens as they come; a character split over tokens comes out with its last one.

    Attributes:
        n_chars: Characters that came out.
        begin: Characters before the one in which the last token begins.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], skipped: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.n_chars = 0
        self.begin = 0

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; may be empty."""
        self.begin = self.n_chars
        if token_id in self._skipped:
            return ""
        data = self._token_bytes(token_id)
        text = self._decoder.decode(data[:1])
        if text:
            # The last of these is the first byte's own, unless that one waits for more bytes; one
            # before it is a character that the byte broke.
            self.begin += len(text) - (not self._decoder.getstate()[0])
        text += self._decoder.decode(data[1:])
        self.n_chars += len(text)
        return text

    def finish(self) -> str:
        """Return what is left: U+FFFD for an unfinished character, else nothing."""
        text = self._decoder.decode(b"", final=True)
        self.n_chars += len(text)
        return text


def _without(text: str, shield: str) -> str:
    return text.replace(shield, "") if shield else text


def _surrogate(error: UnicodeEncodeError) -> RequestError:
    return RequestError(
        f"the text holds U+{ord(error.object[error.start]):04X}, half of a surrogate pair, at "
        f"character {error.start:,}; send valid Unicode"
    )
