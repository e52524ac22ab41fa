"""`/v1/chat/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from fomoe.engine.requests import TokenEvent
from fomoe.errors import RequestError
from fomoe.model.chat_messages import normalise_options
from fomoe.server.answers import Answer
from fomoe.server.building import engine_requests
from fomoe.server.choices import Delta
from fomoe.server.logprobs import chat_logprobs
from fomoe.server.receipts import timings
from fomoe.server.running import Done, Indexed, Item, Run
from fomoe.server.schemas import ChatBody
from fomoe.server.services import Services, new_id
from fomoe.server.streaming import EventStream, JsonAnswer, frame
from fomoe.server.tool_calls import BEGIN, ToolCallParser


def chat_router(services: Services) -> APIRouter:
    """Return the route of chat completions."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody) -> Response:
        """Answer a conversation."""
        if body.top_logprobs and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
        prompt = await asyncio.to_thread(chat_prompt, services, body)
        request_id = new_id("chatcmpl")
        requests = engine_requests(
            body,
            [prompt],
            services.limits,
            request_id=request_id,
            max_tokens=body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else -1,
        )
        run = services.run(body, requests, thinking=services.thinks())
        answer = ChatAnswer(services, body, run, request_id)
        if body.stream:
            return EventStream(answer.frames(), stall_s=services.info.stall_s)
        return JsonAnswer(answer.whole)

    return router


def chat_prompt(services: Services, body: ChatBody) -> list[int]:
    """Return the tokens of the conversation.

    Raises:
        RequestError: the messages, the tools or the template's options are refused.
    """
    options = normalise_options(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        options |= normalise_options({"reasoning_effort": body.reasoning_effort}, prefix="")
        if body.reasoning_effort == "none":
            options.setdefault("enable_thinking", False)
    return services.chat.prompt_ids(body.messages, tools=shown_tools(body), **options)


def shown_tools(body: ChatBody) -> list[Any] | None:
    """Return the tools that the model is to see.

    Raises:
        RequestError: the client wants to force a call.
    """
    if body.tool_choice not in (None, "auto", "none"):
        raise RequestError(
            "only the tool choices auto and none are supported: answers are not constrained",
            "tool_choice",
        )
    return None if body.tool_choice == "none" else body.tools


@dataclass(slots=True)
class _Choice:
    """What one answer has gathered."""

    parser: ToolCallParser | None
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[TokenEvent] = field(default_factory=list)
    finish: str = "stop"

    def add(self, delta: Delta) -> dict[str, Any]:
        """Take another part; returns what a stream's `delta` shows of it."""
        content, calls = delta.content, list[dict[str, Any]]()
        if self.parser is not None:
            content, calls = self.parser.push(content)
        self.content.append(content)
        self.reasoning.append(delta.reasoning)
        self.calls += calls
        self.tokens += delta.tokens
        gained = {"reasoning_content": delta.reasoning, "content": content, "tool_calls": calls}
        return {name: value for name, value in gained.items() if value}

    def end(self, done: Done) -> str:
        """Take the end; returns text that was held back."""
        rest = self.parser.finish() if self.parser else ""
        self.content.append(rest)
        self.finish = "tool_calls" if self.calls and done.reason == "stop" else done.reason
        return rest


class ChatAnswer(Answer):
    """Writes the answers of one chat request."""

    def __init__(self, services: Services, body: ChatBody, run: Run, request_id: str) -> None:
        super().__init__(services, body, run, request_id)
        self.head["object"] = "chat.completion.chunk" if body.stream else "chat.completion"
        self._wants_logprobs = bool(body.logprobs)
        self._wants_ids = bool(body.return_token_ids)
        tools = shown_tools(body) if BEGIN in services.chat.source else None
        self._choices = [_Choice(ToolCallParser(tools) if tools else None) for _ in run.jobs]

    def take(self, item: Item) -> None:
        """Gather an item for the whole answer."""
        if isinstance(item, Delta):
            self._choices[item.index].add(item)
        elif isinstance(item, Done):
            self._choices[item.index].end(item)

    def choices(self) -> list[dict[str, Any]]:
        """Return the gathered messages."""
        return [self._shape(index, one) for index, one in enumerate(self._choices)]

    async def whole(self) -> dict[str, Any]:
        """Return the response's body once everything is there."""
        return await super().whole() | self._prompt()

    def openings(self) -> list[bytes]:
        """Return the frames that begin each message."""
        begin = {"role": "assistant", "content": ""}
        return [
            self._chunk(index, begin, more={} if index else self._prompt())
            for index in range(len(self._choices))
        ]

    def shown(self, item: Item) -> bytes | None:
        """Return the frame for an item."""
        choice = self._choices[item.index]
        if isinstance(item, Done):
            rest = choice.end(item)
            last = self._chunk(item.index, {"content": rest}) if rest else b""
            more = {"timings": timings(item.receipt)}
            return last + self._chunk(item.index, {}, finish=choice.finish, more=more)
        if isinstance(item, Indexed):
            shown = self.progress(item)
            return None if shown is None else self._chunk(item.index, {}, more=shown)
        gained = choice.add(item)
        if not gained and not (item.tokens and (self._wants_logprobs or self._wants_ids)):
            return None
        return self._chunk(item.index, gained, tokens=item.tokens)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        tokens: Sequence[TokenEvent] = (),
        finish: str | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": finish}
        return frame(self.head | {"choices": [choice | self._details(tokens)], **(more or {})})

    def _shape(self, index: int, choice: _Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(choice.content)}
        if reasoning := "".join(choice.reasoning):
            message["reasoning_content"] = reasoning
        if choice.calls:
            message["tool_calls"] = choice.calls
        whole = {"index": index, "message": message, "finish_reason": choice.finish}
        return whole | self._details(choice.tokens)

    def _prompt(self) -> dict[str, Any]:
        """Return the prompt's tokens where they were asked for."""
        return {"prompt_token_ids": self.run.jobs[0].request.prompt} if self._wants_ids else {}

    def _details(self, tokens: Sequence[TokenEvent]) -> dict[str, Any]:
        """Return what was asked for about the tokens of a choice."""
        details: dict[str, Any] = {"logprobs": None}
        if self._wants_logprobs and tokens:
            details["logprobs"] = chat_logprobs(self.services.tokenizer, tokens)
        if self._wants_ids:
            details["token_ids"] = [event.token for event in tokens]
        return details
