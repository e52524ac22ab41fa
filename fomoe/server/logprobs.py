"""Log probabilities in the two shapes that OpenAI gives them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fomoe.engine.requests import TokenEvent
from fomoe.model.tokenizer import Tokenizer, TokenStream

# JSON has no infinity; this is what vLLM sends for a probability of zero.
LOWEST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[TokenEvent]) -> dict[str, Any]:
    """Return the `logprobs` of a chat choice for the given tokens."""
    content = [
        _entry(tokenizer, event.token, event.logprob)
        | {"top_logprobs": [_entry(tokenizer, token, value) for token, value in event.top]}
        for event in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Collects the `logprobs` of a plain completion; text offsets go on over several parts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream(skip_special=True)  # as the answer's text is decoded
        self._echoed = 0

    def prompt(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        top: Sequence[Sequence[tuple[int, float]]],
    ) -> dict[str, Any]:
        """Return the lists for the prompt, whose text precedes what is generated."""
        stream = self._tokenizer.stream()
        lists = self._lists(stream, tokens, logprobs, top)
        stream.finish()
        self._echoed = stream.n_chars
        return lists

    def generated(self, tokens: Sequence[TokenEvent]) -> dict[str, Any]:
        """Return the lists for some more generated tokens."""
        lists = self._lists(
            self._stream,
            [one.token for one in tokens],
            [one.logprob for one in tokens],
            [one.top for one in tokens],
        )
        lists["text_offset"] = [self._echoed + offset for offset in lists["text_offset"]]
        return lists

    def _lists(
        self,
        stream: TokenStream,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        top: Sequence[Sequence[tuple[int, float]]],
    ) -> dict[str, Any]:
        texts, offsets = [], []
        for token in tokens:
            stream.push(token)
            texts.append(token_text(self._tokenizer, token))
            offsets.append(stream.begin)
        return {
            "tokens": texts,
            "token_logprobs": [None if one is None else finite(one) for one in logprobs],
            "top_logprobs": [
                None if own is None else self._alternatives(token, own, best)
                for token, own, best in zip(tokens, logprobs, top, strict=True)
            ],
            "text_offset": offsets,
        }

    def _alternatives(
        self, token: int, own: float, best: Sequence[tuple[int, float]]
    ) -> dict[str, float]:
        """Return the best tokens by text, and the token itself whether it is among them or not."""
        found: dict[str, float] = {}
        for other, value in (*best, (token, own)):
            found.setdefault(token_text(self._tokenizer, other), finite(value))
        return found


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""Return a token's text; one that is no whole character is written like `bytes:\xe2`."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float) -> float:
    """Return a log probability that JSON can hold."""
    return max(LOWEST, logprob)


def _entry(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, token),
        "logprob": finite(LOWEST if logprob is None else logprob),
        "bytes": list(tokenizer.token_bytes(token)),
    }
