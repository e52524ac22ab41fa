"""From the tokens of one answer to the text that its client gets."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fomoe.engine.requests import TokenEvent
from fomoe.model.tokenizer import TokenStream
from fomoe.server.text import Finder, ThinkSplitter


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What answer number `index` gained: text, and the tokens whose text is complete with it.

    `stopped` says that a stop string ends the answer here.
    """

    index: int
    content: str = ""
    reasoning: str = ""
    tokens: tuple[TokenEvent, ...] = ()
    stopped: bool = False


class ChoiceText:
    """The text of one answer: decoded, thinking split off, cut at stop strings.

    Stop strings are looked for in the content, not in the thinking. Tokens are handed on when
    their text is, so log probabilities never run ahead of the text or past a stop.

    Attributes:
        stopped: Whether a stop string was found.
        n_tokens: Tokens taken.
        n_reasoning: Those of them that belong to the thinking.
    """

    def __init__(
        self,
        index: int,
        decoder: TokenStream,
        *,
        stops: Sequence[str] = (),
        min_tokens: int = 0,
        thinking: ThinkSplitter | None = None,
    ) -> None:
        self.index = index
        self.stopped = False
        self.n_tokens = 0
        self.n_reasoning = 0
        self._decoder = decoder
        self._stops = Finder(stops)
        self._min_tokens = min_tokens
        self._thinking = thinking
        self._n_chars = 0
        self._waiting: deque[tuple[TokenEvent, int, int]] = deque()  # with begin and end of text

    def push(self, event: TokenEvent) -> Delta:
        """Take the next token."""
        self.n_tokens += 1
        text = self._decoder.push(event.token)
        begin, self._n_chars = self._n_chars, self._n_chars + len(text)
        self._waiting.append((event, begin, self._n_chars))
        if self._thinking is None:
            reasoning, content = "", text
        else:
            self.n_reasoning += self._thinking.inside
            reasoning, content = self._thinking.push(text)
        content = self._until_stop(content)
        return self._delta(content, reasoning)

    def finish(self) -> Delta:
        """Return what was held back; no token follows."""
        if self.stopped:
            return Delta(index=self.index)
        tail = self._decoder.finish()
        self._n_chars += len(tail)
        reasoning, content = "", tail
        if self._thinking is not None:
            reasoning, content = self._thinking.push(tail)
            more_reasoning, more_content = self._thinking.finish()
            reasoning, content = reasoning + more_reasoning, content + more_content
        content = self._until_stop(content)
        if not self.stopped:
            content += self._stops.finish()
        return self._delta(content, reasoning)

    def _until_stop(self, content: str) -> str:
        if self.n_tokens < self._min_tokens:
            return content
        content = self._stops.push(content)
        self.stopped = bool(self._stops.match)
        return content

    def _delta(self, content: str, reasoning: str) -> Delta:
        settled: list[TokenEvent] = []
        if self.stopped:
            cut = self._n_chars - len(self._stops.rest) - len(self._stops.match)
            settled += [event for event, begin, end in self._waiting if begin < cut or end <= cut]
            self._waiting.clear()
        else:
            held = self._stops.n_held + (self._thinking.n_held if self._thinking else 0)
            while self._waiting and self._waiting[0][2] <= self._n_chars - held:
                settled.append(self._waiting.popleft()[0])
        return Delta(
            index=self.index,
            content=content,
            reasoning=reasoning,
            tokens=tuple(settled),
            stopped=self.stopped,
        )
