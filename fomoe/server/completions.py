"""`/v1/completions`: plain text or token ids continued, scored, or both."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from fomoe.engine.requests import PromptLogprobs
from fomoe.errors import RequestError
from fomoe.server.answers import Answer
from fomoe.server.building import engine_requests, parse_prompts
from fomoe.server.choices import Delta
from fomoe.server.logprobs import CompletionLogprobs
from fomoe.server.receipts import timings
from fomoe.server.running import Done, Indexed, Item, Run
from fomoe.server.schemas import CompletionBody
from fomoe.server.services import Services, new_id
from fomoe.server.streaming import EventStream, JsonAnswer, frame

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def completion_router(services: Services) -> APIRouter:
    """Return the route of plain completions."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(body: CompletionBody) -> Response:
        """Continue one or more prompts."""
        if body.suffix:
            raise RequestError("suffix is not supported", "suffix")
        prompts = await asyncio.to_thread(prompt_tokens, services, body)
        request_id = new_id("cmpl")
        longest = body.max_tokens
        if longest is None and body.n_predict is None:
            longest = DEFAULT_MAX_TOKENS
        requests = engine_requests(
            body,
            prompts,
            services.limits,
            request_id=request_id,
            max_tokens=longest,
            logprobs=-1 if body.logprobs is None else body.logprobs,
            echo=bool(body.echo) and body.logprobs is not None,
        )
        answer = CompletionAnswer(services, body, services.run(body, requests), request_id)
        if body.stream:
            return EventStream(answer.frames(), stall_s=services.info.stall_s)
        return JsonAnswer(answer.whole)

    return router


def prompt_tokens(services: Services, body: CompletionBody) -> list[list[int]]:
    """Return the token ids of each prompt; texts get a BOS token where the model wants one.

    Raises:
        RequestError: a prompt is neither text nor token ids.
    """
    tokenizer = services.tokenizer
    encode = tokenizer.encode_special if body.parse_special else tokenizer.encode
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    return [
        one if isinstance(one, list) else [*begin, *encode(one)]
        for one in parse_prompts(body.prompt)
    ]


@dataclass(slots=True)
class _Choice:
    """What one completion has gathered."""

    logprobs: CompletionLogprobs
    text: list[str] = field(default_factory=list)
    lists: dict[str, list[Any]] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    finish: str = "stop"

    def add_lists(self, lists: dict[str, list[Any]]) -> None:
        """Append to the log probabilities."""
        for name, values in lists.items():
            self.lists.setdefault(name, []).extend(values)


class CompletionAnswer(Answer):
    """Writes the completions of one request."""

    def __init__(self, services: Services, body: CompletionBody, run: Run, request_id: str) -> None:
        super().__init__(services, body, run, request_id)
        self.head["object"] = "text_completion"
        self._echo = bool(body.echo)
        self._wants_logprobs = body.logprobs is not None
        self._wants_ids = bool(body.return_token_ids)
        self._choices = [_Choice(CompletionLogprobs(services.tokenizer)) for _ in run.jobs]

    def take(self, item: Item) -> None:
        """Gather an item for the whole answer."""
        choice = self._choices[item.index]
        if isinstance(item, Delta):
            choice.text.append(item.content)
            choice.token_ids += [event.token for event in item.tokens]
            choice.add_lists(self._generated(item) or {})
        elif isinstance(item, Done):
            choice.finish = item.reason
        elif isinstance(item.event, PromptLogprobs):
            choice.add_lists(self._scores(item.index, item.event))

    def choices(self) -> list[dict[str, Any]]:
        """Return the gathered completions."""
        return [self._choice(index, one) for index, one in enumerate(self._choices)]

    def openings(self) -> list[bytes]:
        """Return the frames that echo the prompts, or a first one that says nothing yet."""
        echoes = [self._chunk(index, self._echoed(index)) for index in range(len(self._choices))]
        return echoes if self._echo else echoes[:1]

    def shown(self, item: Item) -> bytes | None:
        """Return the frame for an item."""
        if isinstance(item, Done):
            more = {"timings": timings(item.receipt)}
            return self._chunk(item.index, "", finish=item.reason, more=more)
        if isinstance(item, Indexed):
            if isinstance(item.event, PromptLogprobs):
                scores = self._scores(item.index, item.event)
                return self._chunk(item.index, "", logprobs=scores)
            shown = self.progress(item)
            return None if shown is None else self._chunk(item.index, "", more=shown)
        if not item.content and not (item.tokens and (self._wants_logprobs or self._wants_ids)):
            return None
        ids = [event.token for event in item.tokens]
        return self._chunk(item.index, item.content, logprobs=self._generated(item), ids=ids)

    def _chunk(
        self,
        index: int,
        text: str,
        *,
        logprobs: dict[str, Any] | None = None,
        ids: Sequence[int] = (),
        finish: str | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        if self._wants_ids:
            choice["token_ids"] = list(ids)
        return frame(self.head | {"choices": [choice], **(more or {})})

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        whole = {
            "index": index,
            "text": self._echoed(index) + "".join(choice.text),
            "logprobs": choice.lists or None,
            "finish_reason": choice.finish,
        }
        if self._wants_ids:
            whole["token_ids"] = choice.token_ids
            whole["prompt_token_ids"] = self.run.jobs[index].request.prompt
        return whole

    def _echoed(self, index: int) -> str:
        """Return the prompt's text where it was asked for."""
        prompt = self.run.jobs[index].request.prompt
        return self.services.tokenizer.decode(prompt) if self._echo else ""

    def _scores(self, index: int, event: PromptLogprobs) -> dict[str, Any]:
        """Return the log probabilities of the prompt's own tokens."""
        prompt = self.run.jobs[index].request.prompt
        return self._choices[index].logprobs.prompt(prompt, event.logprobs, event.top)

    def _generated(self, delta: Delta) -> dict[str, Any] | None:
        """Return the log probabilities of generated tokens where they were asked for."""
        if not self._wants_logprobs:
            return None
        return self._choices[delta.index].logprobs.generated(delta.tokens)
