"""One request under way: prompt in chunks, then a token at a step, as events."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from fomoe.config import RoutingConfig
from fomoe.engine.contract import Contract
from fomoe.engine.loop import LayerLoop
from fomoe.engine.meter import Meter
from fomoe.engine.recorder import Recorder
from fomoe.engine.requests import (
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    PromptLogprobs,
    PromptProgress,
    TokenEvent,
)
from fomoe.engine.sampler import log_probabilities, sample
from fomoe.engine.sequences import Sequence
from fomoe.engine.shadow import Shadow, divergence
from fomoe.errors import ConfigError, RequestError
from fomoe.model.buffers import F32
from fomoe.model.layers import HEAD_ROWS
from fomoe.model.state import Batch
from fomoe.quality import parse_quality
from fomoe.traces import Passage

PROGRESS_S = 0.25  # between two progress events inside a chunk


def _nothing() -> None:
    """Nobody wants to end a pass early."""


def _ignore(event: Event) -> None:
    """Nobody wants to know more than a step's events."""


class Generation:
    """Advances one sequence; each `step` is one pass through the layers and returns its events."""

    def __init__(
        self,
        request: GenerateRequest,
        sequence: Sequence,
        forward: LayerLoop,
        meter: Meter,
        *,
        chunk: int,
        routing: RoutingConfig,
        serial: bool = False,
    ) -> None:
        check_request(request, sequence.state.ctx_size, forward.spec.vocab)
        self.request = request
        self.finished = False
        self._sequence = sequence
        self._forward = forward
        self._serial = serial
        self._on_event: Callable[[Event], None] = _ignore
        self._checkpoint: Callable[[], None] = _nothing
        self._chunk = chunk
        self._meter = meter
        self._prompt_counts = Counter(request.prompt)
        self._output_counts: Counter[int] = Counter()
        self._generated = 0
        self._next: int | None = None
        self._echo: list[float | None] = [None]
        self._echo_top: list[list[tuple[int, float]]] = [[]]
        quality = routing.quality if request.quality is None else parse_quality(request.quality)
        self._contract = Contract(quality, routing.shadow_every, routing.sensitivities)
        if self._contract.needs_twin and not forward.has_twin:
            raise RequestError(
                f"quality {quality} needs a second state on the devices, which they have no room "
                "set aside for; start with --quality kl=... or a --shadow-every above 0",
                "quality",
            )
        afresh = request.echo or not quality.is_exact or request.null_share > 0.0
        self._cached = 0 if afresh else sequence.reusable_prefix(request.prompt)
        if not self._cached:
            sequence.reset()
        sequence.hold(self._contract.rule)
        sequence.decoding = False
        sequence.touched = request.null_share
        forward.follow(None if sequence.exact else sequence.logical)
        self._shadow: Shadow | None = None
        meter.start(quality, cached=self._cached)
        recorder = forward.recorder
        self._trace_number = 0 if recorder is None else recorder.new_sequence()
        self._processed = self._cached
        self._started = self._reported = time.monotonic()

    def watch(self, on_event: Callable[[Event], None], checkpoint: Callable[[], None]) -> None:
        """Look inside the chunks of a prompt, which may take long.

        `on_event` gets their progress. `checkpoint` is called after each layer; what it raises
        ends the pass, and the request is then to be ended by `fail` or `abandon`.
        """
        self._on_event, self._checkpoint = on_event, checkpoint

    def step(self) -> list[Event]:
        """Run one prompt chunk or one decode step."""
        if self._next is None:
            return self._prefill()
        token, self._next = self._next, None
        return self._choose(self._decode(token))

    def _decode(self, token: int) -> F32:
        """Run a decode step under the contract, and its exact twin where that is due."""
        sequence, contract, meter = self._sequence, self._contract, self._meter
        shadowed, price = contract.is_shadowed, contract.price
        if shadowed:
            self._shadow = self._shadow or Shadow(self._forward, sequence)
            self._shadow.take()
        sequence.decoding = True
        sequence.prices = None if price is None else np.array([price], np.float32)
        self._run([token])
        logits: F32 = self._forward.logits(_LAST)[0]
        if contract.quality.is_exact:
            return logits
        missing, loss = sequence.reads, None
        if shadowed and self._shadow is not None:
            logits = logits.copy()  # the twin's come into the same buffer
            with meter.shadow():
                exact, more = self._shadow.repeat(token)
            missing, loss = missing + more, divergence(exact, logits)
        spent = int(missing @ self._forward.expert_bytes)
        meter.stepped(price or 0.0, spent)
        whole = contract.stepped(spent, loss)
        if loss is not None:
            meter.shadowed(whole)
        return logits

    @property
    def in_prompt(self) -> bool:
        """Whether the prompt has not gone through the layers yet."""
        return self._generated == 0 and not self.finished

    @property
    def prompt_tokens(self) -> tuple[int, int]:
        """How many tokens of the prompt have gone through the layers, layers counted, of all."""
        return self._processed, len(self.request.prompt)

    def cancel(self) -> Finished:
        """End the request early."""
        return self._finish("cancelled")

    def fail(self, message: str) -> Finished:
        """End the request with an error; its sequence is not continued from."""
        self._sequence.reset()
        return self._finish("error", error=message)

    def abandon(self) -> Finished:
        """End the request in the middle of a pass; its sequence is not continued from."""
        self._sequence.reset()
        return self._finish("cancelled")

    def _run(self, tokens: list[int]) -> None:
        forward, sequence = self._forward, self._sequence
        batch = Batch.of([(sequence.state, tokens)])
        if self._serial:
            forward.step_serial(batch, (sequence,))
        elif sequence.decoding:
            forward.step(batch, (sequence,))
        else:
            forward.prefill(batch, (sequence,), self._on_layer)
        if forward.recorder is not None:
            self._record(forward.recorder, tokens)
        sequence.tokens.extend(tokens)

    def _record(self, recorder: Recorder, tokens: list[int]) -> None:
        sequence, request = self._sequence, self.request
        passage = Passage(
            sequence=self._trace_number, tokens=tokens, position=len(sequence.tokens),
            label=request.request_id, domain=request.domain, is_prompt=not sequence.decoding,
            hash=sequence.logical.hash,
        )  # fmt: skip
        recorder.write(passage)

    def _on_layer(self, layer: int) -> None:
        """Report a long chunk's progress: the layers done count as so many of its tokens."""
        self._checkpoint()
        now = time.monotonic()
        done, n_layers = len(self._sequence.tokens), self._forward.spec.n_layers
        part = min(self._chunk, len(self.request.prompt) - done)
        self._processed = done + part * (layer + 1) // n_layers
        if now - self._reported < PROGRESS_S or layer + 1 == n_layers:
            return  # the pass itself reports its end
        self._reported = now
        self._on_event(self._progress(self._processed))

    def _progress(self, processed: int) -> PromptProgress:
        return PromptProgress(
            request_id=self.request.request_id,
            total=len(self.request.prompt),
            processed=processed,
            cached=self._cached,
            time_ms=(time.monotonic() - self._started) * 1e3,
        )

    def _prefill(self) -> list[Event]:
        request, done = self.request, len(self._sequence.tokens)
        part = request.prompt[done : done + self._chunk]
        self._run(part)
        done += len(part)
        if request.echo:
            self._score_prompt(done - len(part), len(part))
        events: list[Event] = [self._progress(done)]
        if done < len(request.prompt):
            return events
        if request.echo:
            events.append(
                PromptLogprobs(
                    request_id=request.request_id, logprobs=self._echo, top=self._echo_top
                )
            )
        self._meter.prompt_done(len(request.prompt))
        if request.max_tokens == 0:
            return [*events, self._finish("length")]
        last = np.array([len(part) - 1])
        return events + self._choose(self._forward.logits(last)[0])

    def _score_prompt(self, start: int, count: int) -> None:
        """Collect the log probability of each prompt token that follows a row of this chunk."""
        prompt, n_top = self.request.prompt, max(0, self.request.logprobs)
        for row in range(0, count, HEAD_ROWS):
            rows = np.arange(row, min(row + HEAD_ROWS, count))
            logits = self._forward.logits(rows)
            for offset, one in zip(rows, logits, strict=True):
                following = start + int(offset) + 1
                if following < len(prompt):
                    own, top = log_probabilities(one, prompt[following], n_top)
                    self._echo.append(own)
                    self._echo_top.append(top)

    def _choose(self, logits: F32) -> list[Event]:
        request = self.request
        position = len(self._sequence.tokens)
        raw = logits.astype("<f4").tobytes() if request.logits else b""
        if self._generated < request.min_tokens and request.stop_ids:
            logits = logits.copy()
            logits[list(request.stop_ids)] = -np.inf
        token = sample(logits, request.sampling, position, self._prompt_counts, self._output_counts)
        if self._generated < len(request.forced):
            token = request.forced[self._generated]
        if token in request.stop_ids:
            return [self._finish("stop", stop_id=token)]
        self._generated += 1
        self._output_counts[token] += 1
        self._meter.token()
        own: float | None = None
        top: list[tuple[int, float]] = []
        if request.logprobs >= 0:
            own, top = log_probabilities(logits, token, request.logprobs)
        events: list[Event] = [
            TokenEvent(
                request_id=request.request_id,
                token=token,
                logprob=own,
                top=top,
                parts_s=list(self._meter.token_parts) if request.waterfall else [],
                logits=raw,
            )
        ]
        full = position + 1 > self._sequence.state.ctx_size
        if self._generated >= request.max_tokens or full:
            return [*events, self._finish("length")]
        self._next = token
        return events

    def _finish(
        self, reason: FinishReason, *, stop_id: int | None = None, error: str | None = None
    ) -> Finished:
        self.finished = True
        return Finished(
            request_id=self.request.request_id,
            reason=reason,
            stop_id=stop_id,
            error=error,
            receipt=self._meter.receipt(self._sequence.logical.hash),
        )


_LAST = np.array([0])
_FAR = 1e6  # beyond this a float32 logit keeps nothing of what the model said
_RANGES = {
    "temperature": (0.0, _FAR),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1 / _FAR, _FAR),
    "presence_penalty": (-_FAR, _FAR),
    "frequency_penalty": (-_FAR, _FAR),
}


def check_request(request: GenerateRequest, ctx_size: int, vocab: int) -> None:
    """Refuse a request that cannot run; RequestError names the field."""
    if not request.prompt:
        raise RequestError("the prompt has no tokens", "prompt")
    if len(request.prompt) > ctx_size:
        raise RequestError(
            f"the prompt has {len(request.prompt):,} tokens, the context holds {ctx_size:,}; "
            "shorten it or start with a larger --ctx-size",
            "prompt",
        )
    if not all(isinstance(token, int) for token in request.prompt):
        raise RequestError("the prompt's token ids must be whole numbers", "prompt")
    worst = max(request.prompt, key=lambda t: -1 if 0 <= t < vocab else abs(t) + vocab)
    if not 0 <= worst < vocab:
        raise RequestError(f"token id {worst} is outside the vocabulary of {vocab:,}", "prompt")
    named = {
        "logit_bias": request.sampling.logit_bias,
        "stop_ids": request.stop_ids,
        "forced": request.forced,
    }
    for param, ids in named.items():
        outside = [t for t in ids if not 0 <= t < vocab]
        if outside:
            raise RequestError(f"{param} names token {outside[0]} of {vocab:,}", param)
    _check_numbers(request)


def _check_numbers(request: GenerateRequest) -> None:
    """Refuse what came as another type too: in the loop it would end the engine."""
    sampling = request.sampling
    for name, least in (("max_tokens", 0), ("min_tokens", 0), ("logprobs", -1)):
        _check_whole(name, getattr(request, name), least)
    _check_whole("top_k", sampling.top_k, -1)
    _check_whole("seed", sampling.seed, -(1 << 63))
    for name, (low, high) in _RANGES.items():
        _check_range(name, getattr(sampling, name), low, high)
    for bias in sampling.logit_bias.values():
        _check_range("logit_bias", bias, -_FAR, _FAR)
    _check_range("null_share", request.null_share, 0.0, 1.0)
    _check_quality(request.quality)


def _check_quality(text: Any) -> None:
    try:
        if text is not None:
            parse_quality(text if isinstance(text, str) else repr(text))
    except ConfigError as error:
        raise RequestError(str(error), "quality") from None


def _check_whole(param: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise RequestError(f"{param} is {value!r}; give a whole number from {least} up", param)


def _check_range(param: str, value: Any, low: float, high: float) -> None:
    if not isinstance(value, float | int) or not low <= value <= high:
        raise RequestError(f"{param} is {value!r}; it must lie between {low} and {high}", param)
