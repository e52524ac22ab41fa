"""An engine that says what a script tells it to, and remembers what became of its requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from fomoe.engine.requests import (
    EngineStatus,
    Event,
    Finished,
    GenerateRequest,
    PromptLogprobs,
    PromptProgress,
    Receipt,
    TokenEvent,
)

Script = Callable[[GenerateRequest], list[int]]
TIERS = {"hits_device": 6, "hits_ram": 3, "reads_nvme": 1, "nvme_bytes": 4096, "stall_ms": 2.0}


@dataclass
class FakeEngine:
    """Says `script(request)`, `delay` seconds per token, after `prompt_delay` for the prompt.

    A token in `stop_ids` ends the answer. Token t has log probability -t/1000, and the `top` ones
    are t, t+1, ...
    """

    script: Script
    delay: float = 0.0
    prompt_delay: float = 0.0
    ctx_size: int = 2048
    fail_after: int | None = None
    fail_first: Exception | None = None
    state: EngineStatus = field(default_factory=lambda: EngineStatus(state="ready"))
    asked: list[GenerateRequest] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    cancelled: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    said: int = 0
    by_id: set[str] = field(default_factory=set)

    def status(self) -> EngineStatus:
        return self.state

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        if self.fail_first is not None:
            raise self.fail_first
        name = request.request_id
        self.asked.append(request)
        self.running.add(name)
        try:
            async for event in self._events(request):
                if isinstance(event, Finished):
                    self.finished.append(name)
                yield event
        finally:
            self.running.discard(name)
            if name not in self.finished:
                self.cancelled.append(name)

    async def _events(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        name, prompt = request.request_id, request.prompt
        half = len(prompt) // 2
        for done in (half, len(prompt)):
            await asyncio.sleep(self.prompt_delay / 2)
            yield PromptProgress(
                request_id=name, total=len(prompt), processed=done, cached=1, time_ms=5.0
            )
        if request.echo:
            yield PromptLogprobs(
                request_id=name,
                logprobs=[None, *(-t / 1000 for t in prompt[1:])],
                top=[[], *(_top(t, request.logprobs) for t in prompt[1:])],
            )
        generated = 0
        for token in self.script(request)[: request.max_tokens]:
            if token in request.stop_ids:
                yield self._finished(request, "stop", generated, stop_id=token)
                return
            await asyncio.sleep(self.delay)
            if self.fail_after == generated:
                yield Finished(request_id=name, reason="error", error="the disk is on fire")
                return
            generated += 1
            self.said += 1
            logprob, top = None, []
            if request.logprobs >= 0:
                logprob, top = -token / 1000, _top(token, request.logprobs)
            yield TokenEvent(request_id=name, token=token, logprob=logprob, top=top)
        yield self._finished(request, "length", generated)

    def _finished(
        self, request: GenerateRequest, reason: Any, generated: int, **more: Any
    ) -> Finished:
        mode = request.quality or "exact"
        return Finished(
            request_id=request.request_id,
            reason=reason,
            receipt=Receipt(
                prompt_tokens=len(request.prompt),
                cached_tokens=1,
                prompt_ms=5.0,
                generated_tokens=generated,
                generated_ms=2.0 * generated,
                mode=mode,
                substituted=0 if mode == "exact" else 2,
                **TIERS,
            ),
            **more,
        )


class CancellableEngine(FakeEngine):
    """Ends a request by its id and still reports what it cost."""

    async def _events(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        generated = 0
        async for event in super()._events(request):
            if request.request_id in self.by_id:
                yield self._finished(request, "cancelled", generated)
                return
            generated += isinstance(event, TokenEvent)
            yield event

    def cancel(self, request_id: str) -> None:
        self.by_id.add(request_id)


def _top(token: int, count: int) -> list[tuple[int, float]]:
    return [(token + i, -(token + i) / 1000) for i in range(max(0, count))]
