"""What the routes share: the parts of the server and the steps common to both kinds of answer."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import fomoe
from fomoe.engine.requests import Engine, GenerateRequest, PromptProgress, Receipt
from fomoe.model.chat import ChatTemplate
from fomoe.model.tokenizer import Tokenizer
from fomoe.server.building import Limits, stop_strings
from fomoe.server.choices import ChoiceText
from fomoe.server.info import ServerInfo
from fomoe.server.metrics import ServerMetrics
from fomoe.server.receipts import combined, timings, usage
from fomoe.server.running import Job, Run
from fomoe.server.schemas import GenerationBody
from fomoe.server.streaming import comment
from fomoe.server.text import END_THINK, THINK, ThinkSplitter


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The parts of one server."""

    engine: Engine
    tokenizer: Tokenizer
    chat: ChatTemplate
    info: ServerInfo
    metrics: ServerMetrics

    @property
    def limits(self) -> Limits:
        """What the model and the engine allow."""
        return Limits(
            n_vocab=self.tokenizer.n_vocab,
            ctx_size=self.engine.ctx_size,
            eos_ids=self.tokenizer.eos_ids,
            defaults=self.info.sampling,
        )

    def run(
        self, body: GenerationBody, requests: Sequence[GenerateRequest], *, thinking: bool = False
    ) -> Run:
        """Return the answers to make; `thinking` splits off what the model thinks first."""
        jobs = [
            Job(request=request, text=self._text(body, index, request, thinking))
            for index, request in enumerate(requests)
        ]
        return Run(self.engine, self.info, self.metrics, jobs)

    def thinks(self) -> bool:
        """Whether the model's template speaks of thinking."""
        return END_THINK in self.chat.source

    def _text(
        self, body: GenerationBody, index: int, request: GenerateRequest, thinking: bool
    ) -> ChoiceText:
        end = self.tokenizer.decode(request.prompt[-8:]).rstrip() if thinking else ""
        return ChoiceText(
            index,
            self.tokenizer.stream(skip_special=True),
            stops=stop_strings(body),
            min_tokens=request.min_tokens,
            thinking=ThinkSplitter(inside=end.endswith(THINK)) if thinking else None,
        )


def new_id(kind: str) -> str:
    """Return an id for a response, for example `chatcmpl-...`."""
    return f"{kind}-{uuid.uuid4().hex}"


def fingerprint() -> str:
    """Return what OpenAI calls system_fingerprint: the program and its version."""
    return f"fomoe-{fomoe.__version__}"


def totals(run: Run, n: int) -> dict[str, Any]:
    """Return `usage` and `timings` of a finished request with `n` choices per prompt."""
    receipts = [job.receipt or Receipt() for job in run.jobs]
    firsts = range(0, len(run.jobs), n)
    return {
        "usage": usage(
            prompt=sum(len(run.jobs[i].request.prompt) for i in firsts),
            cached=sum(receipts[i].cached_tokens for i in firsts),
            generated=sum(job.text.n_tokens for job in run.jobs),
            reasoning=sum(job.text.n_reasoning for job in run.jobs),
        ),
        "timings": timings(combined(receipts)),
    }


def progress(event: PromptProgress) -> dict[str, Any]:
    """Return llama.cpp's `prompt_progress`."""
    return {
        "total": event.total,
        "cache": event.cached,
        "processed": event.processed,
        "time_ms": event.time_ms,
    }


def ping(last: PromptProgress | None) -> bytes:
    """Return a sign of life, which says how far the prompt is."""
    return comment("ping" if last is None else f"prompt {last.processed}/{last.total}")
