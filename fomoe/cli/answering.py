"""Drives one request through an engine and hands the text out piece by piece."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from fomoe.engine.requests import (
    Engine,
    Event,
    Finished,
    GenerateRequest,
    PromptProgress,
    Receipt,
    SamplingParams,
    TokenEvent,
)
from fomoe.errors import EngineError
from fomoe.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back: the text, its tokens, why it ended and what it cost."""

    text: str
    token_ids: list[int]
    finish_reason: str
    receipt: Receipt


async def events_of(engine: Engine, request: GenerateRequest) -> AsyncGenerator[Event, None]:
    """Yield a request's events; the request is cancelled when the caller stops reading."""
    events = engine.generate(request)
    try:
        async for event in events:
            yield event
    finally:
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()


async def answer(
    engine: Engine,
    tokenizer: Tokenizer,
    request: GenerateRequest,
    *,
    on_text: Callable[[str], None],
    on_progress: Callable[[PromptProgress], None],
) -> Answer:
    """Run one request; `on_text` gets each piece of text as it becomes whole characters.

    Raises:
        EngineError: the engine failed, or ended without saying so.
    """
    stream = tokenizer.stream(skip_special=True)
    pieces: list[str] = []
    ids: list[int] = []

    def emit(text: str) -> None:
        if text:
            pieces.append(text)
            on_text(text)

    async with aclosing(events_of(engine, request)) as events:
        async for event in events:
            if isinstance(event, TokenEvent):
                ids.append(event.token)
                emit(stream.push(event.token))
            elif isinstance(event, PromptProgress):
                on_progress(event)
            elif isinstance(event, Finished):
                emit(stream.finish())
                if event.reason == "error":
                    raise EngineError(event.error or "the engine failed without a reason")
                return Answer(
                    text="".join(pieces),
                    token_ids=ids,
                    finish_reason=event.reason,
                    receipt=event.receipt,
                )
    raise EngineError("the engine ended without finishing the answer")


def make_request(
    prompt: list[int], tokenizer: Tokenizer, *, max_tokens: int, sampling: SamplingParams
) -> GenerateRequest:
    """Return a request that ends where the model ends its turn."""
    return GenerateRequest(
        request_id=f"run-{uuid.uuid4().hex[:12]}",
        prompt=prompt,
        max_tokens=max_tokens,
        stop_ids=tokenizer.eos_ids,
        sampling=sampling,
    )
