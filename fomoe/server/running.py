"""Follows the answers of one HTTP request from the first prompt chunk to the receipts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fomoe.engine.requests import (
    Engine,
    Event,
    Finished,
    GenerateRequest,
    PromptLogprobs,
    PromptProgress,
    Receipt,
)
from fomoe.server.choices import ChoiceText, Delta
from fomoe.server.errors import ApiError
from fomoe.server.fanout import Fanout
from fomoe.server.info import ServerInfo
from fomoe.server.metrics import ServerMetrics
from fomoe.server.receipts import UNMEASURED

log = logging.getLogger(__name__)

# A refusal by the engine comes at once; waiting this long for it lets it become an HTTP status
# instead of an error inside a stream.
FIRST_WAIT_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Answer number `index` is complete; `reason` is OpenAI's finish_reason."""

    index: int
    reason: str
    receipt: Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexed:
    """An event of the prompt of answer number `index`."""

    index: int
    event: PromptProgress | PromptLogprobs


Item = Delta | Done | Indexed
_What = TypeVar("_What", Receipt, PromptProgress)


@dataclass(slots=True, kw_only=True)
class Job:
    """One answer to make, and how far it is."""

    request: GenerateRequest
    text: ChoiceText
    receipt: Receipt | None = None
    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0


class Run:
    """All answers of one HTTP request."""

    def __init__(
        self, engine: Engine, info: ServerInfo, metrics: ServerMetrics, jobs: Sequence[Job]
    ) -> None:
        self.jobs = jobs
        self._engine = engine
        self._info = info
        self._metrics = metrics
        self._fanout = Fanout(engine, [job.request for job in jobs])
        self._open = set(range(len(jobs)))

    async def items(self) -> AsyncGenerator[Item | None, None]:
        """Yield what happens; None when nothing did for a while. Closing it cancels the answers.

        Raises:
            ApiError: an answer failed.
            RequestError: the engine refuses a request.
        """
        try:
            async with self._fanout:
                silence = FIRST_WAIT_S
                while self._open:
                    got = await self._fanout.next(silence)
                    silence = self._info.ping_s
                    for item in [None] if got is None else self._taken(*got):
                        yield item
        except (GeneratorExit, asyncio.CancelledError):
            begun = any(job.first is not None for job in self.jobs)
            self._metrics.cancelled("decode" if begun else "prompt")
            raise
        except Exception:
            self._metrics.failed()
            raise

    def _taken(self, index: int, event: Event) -> list[Item]:
        """Return what an event of answer `index` amounts to."""
        job = self.jobs[index]
        if index not in self._open:
            return []
        if isinstance(event, PromptProgress):
            self._tell(self._info.on_progress, event)
        if isinstance(event, (PromptProgress, PromptLogprobs)):
            return [Indexed(index=index, event=event)]
        if isinstance(event, Finished):
            return [self._rest(job, event), self._done(job, event)]
        if job.text.stopped:
            return []
        self._time_token(job)
        delta = job.text.push(event)
        if delta.stopped and not self._fanout.stop(index):
            return [delta, self._done(job, _unmeasured(job))]
        return [delta]

    def _rest(self, job: Job, event: Finished) -> Delta:
        """Return the rest of the text of an answer that ended well."""
        if event.reason == "error":
            raise ApiError(500, event.error or "the engine failed without saying why")
        if event.reason == "cancelled" and not job.text.stopped:
            raise ApiError(503, "the answer was cancelled by the server")
        return job.text.finish()

    def _done(self, job: Job, event: Finished) -> Done:
        index = job.text.index
        self._open.discard(index)
        job.receipt = event.receipt
        reason = "length" if event.reason == "length" and not job.text.stopped else "stop"
        self._metrics.answered(reason, event.receipt)
        self._tell(self._info.on_answer, event.receipt)
        return Done(index=index, reason=reason, receipt=event.receipt)

    def _tell(self, who: Callable[[_What], None], what: _What) -> None:
        """Report something; what goes wrong there ends no answer."""
        try:
            who(what)
        except Exception:
            log.exception("%s could not be reported", what)

    def _time_token(self, job: Job) -> None:
        now = time.monotonic()
        if job.first is None:
            job.first = now
            self._metrics.first_token(now - job.started)
        else:
            self._metrics.next_token(now - job.last)
        job.last = now


def _unmeasured(job: Job) -> Finished:
    """Return the end of an answer whose engine reports nothing about cancelled requests."""
    begun = job.last if job.first is None else job.first
    receipt = Receipt(
        prompt_tokens=len(job.request.prompt),
        prompt_ms=(begun - job.started) * 1e3,
        generated_tokens=job.text.n_tokens,
        generated_ms=(job.last - begun) * 1e3,
        mode=UNMEASURED,
    )
    return Finished(request_id=job.request.request_id, reason="stop", receipt=receipt)
