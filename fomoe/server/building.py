"""Turns request bodies into what the engine takes."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fomoe.engine.requests import GenerateRequest, SamplingParams
from fomoe.errors import ConfigError, RequestError
from fomoe.quality import car_quality, parse_quality
from fomoe.server.errors import context_error
from fomoe.server.schemas import MAX_PROMPTS, MAX_SEQUENCES, GenerationBody

SEED_BITS = 63


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the model and the engine allow; `defaults` fill what a request leaves out."""

    n_vocab: int
    ctx_size: int
    eos_ids: frozenset[int]
    defaults: SamplingParams


def engine_requests(
    body: GenerationBody,
    prompts: Sequence[list[int]],
    limits: Limits,
    *,
    request_id: str,
    max_tokens: int | None,
    logprobs: int = -1,
    echo: bool = False,
) -> list[GenerateRequest]:
    """Return one request per prompt and choice, prompt by prompt.

    Args:
        body: The client's request.
        prompts: Token ids of each prompt.
        limits: What is allowed.
        request_id: Beginning of the requests' ids.
        max_tokens: The body's `max_tokens`, or the endpoint's default for it.
        logprobs: Alternatives to report per token, -1 for none.
        echo: Whether to score the prompt too.

    Raises:
        RequestError: a field contradicts another one or the vocabulary.
        ApiError: a prompt does not fit into the context.
    """
    _check_support(body)
    n = body.n or 1
    if n * len(prompts) > MAX_SEQUENCES:
        raise RequestError(
            f"{len(prompts)} prompts with n = {n} are more than {MAX_SEQUENCES} answers", "n"
        )
    sampling = sampling_params(body, limits)
    stop_ids = frozenset(body.stop_token_ids or ())
    if not body.ignore_eos:
        stop_ids |= limits.eos_ids
    _check_ids(stop_ids, limits.n_vocab, "stop_token_ids")
    quality = quality_text(body)
    wanted = _first(body.max_completion_tokens, max_tokens, body.n_predict)
    requests: list[GenerateRequest] = []
    for prompt in prompts:
        _check_prompt(prompt, limits, scored_only=wanted == 0)
        room = limits.ctx_size - len(prompt)
        most = room if wanted is None or wanted < 0 else min(wanted, room)
        for choice in range(n):
            requests.append(
                GenerateRequest(
                    request_id=f"{request_id}-{len(requests)}",
                    prompt=prompt,
                    max_tokens=most,
                    min_tokens=min(body.min_tokens or 0, most),
                    stop_ids=stop_ids,
                    sampling=replace(sampling, seed=(sampling.seed + choice) % (1 << SEED_BITS)),
                    logprobs=logprobs,
                    echo=echo,
                    quality=quality,
                )
            )
    return requests


def sampling_params(body: GenerationBody, limits: Limits) -> SamplingParams:
    """Return how tokens are drawn; no seed, or -1, asks for a random one.

    Raises:
        RequestError: `logit_bias` names something that is no token id.
    """
    seed = body.seed if body.seed not in (None, -1) else secrets.randbits(SEED_BITS)
    given = {
        "temperature": body.temperature,
        "top_k": None if body.top_k is None else max(0, body.top_k),
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repetition_penalty": _first(body.repetition_penalty, body.repeat_penalty),
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": _biases(body.logit_bias, limits.n_vocab),
        "seed": seed % (1 << SEED_BITS),
    }
    return replace(limits.defaults, **{k: v for k, v in given.items() if v is not None})


def quality_text(body: GenerationBody) -> str | None:
    """Return the contract that a request asks for, canonically; None for the server's default.

    Raises:
        RequestError: it is not understood, or `car` is given as well.
    """
    if body.quality is None:
        return None if body.car is None else str(car_quality(body.car))
    if body.car is not None:
        raise RequestError("car is short for quality car=...; give one of the two", "quality")
    try:
        return str(parse_quality(body.quality))
    except ConfigError as error:
        raise RequestError(str(error), "quality") from None


def stop_strings(body: GenerationBody) -> list[str]:
    """Return the strings that end an answer; empty ones are dropped."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return [one for one in stops if one]


def parse_prompts(prompt: Any) -> list[str | list[int]]:
    """Return the prompts of `/v1/completions`: a text, token ids, or a list of either.

    Raises:
        RequestError: it is something else.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise _bad_prompt()
    if all(type(one) is int for one in prompt):
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(f"{len(prompt):,} prompts, at most {MAX_PROMPTS}", "prompt")
    return list(_each_prompt(prompt))


def _each_prompt(prompts: list[Any]) -> Iterator[str | list[int]]:
    for one in prompts:
        ids = isinstance(one, list) and all(type(token) is int for token in one)
        if not ids and not isinstance(one, str):
            raise _bad_prompt()
        yield one


def _bad_prompt() -> RequestError:
    return RequestError(
        "prompt must be a string, a list of token ids, or a list of one kind of them", "prompt"
    )


def _check_prompt(prompt: list[int], limits: Limits, *, scored_only: bool) -> None:
    if not prompt:
        raise RequestError("the prompt has no tokens", "prompt")
    if len(prompt) + (not scored_only) > limits.ctx_size:
        raise context_error(len(prompt), limits.ctx_size)
    _check_ids(prompt, limits.n_vocab, "prompt")


def _check_ids(ids: frozenset[int] | list[int], n_vocab: int, param: str) -> None:
    wrong = next((token for token in ids if not 0 <= token < n_vocab), None)
    if wrong is not None:
        raise RequestError(f"token id {wrong} is outside 0 to {n_vocab - 1:,}", param)


def _check_support(body: GenerationBody) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of is not supported, only n is", "best_of")
    kind = (body.response_format or {}).get("type", "text")
    if kind != "text":
        raise RequestError(
            f"response_format {str(kind)[:40]!r} is not supported: answers are not constrained to "
            "a grammar; ask for JSON in the prompt",
            "response_format",
        )


def _biases(given: dict[str, float] | None, n_vocab: int) -> dict[int, float] | None:
    if given is None:
        return None
    if not all(key.isascii() and key.isdecimal() and len(key) <= 10 for key in given):
        raise RequestError("the keys of logit_bias must be token ids", "logit_bias")
    biases = {int(key): float(value) for key, value in given.items()}
    _check_ids(list(biases), n_vocab, "logit_bias")
    return biases


def _first(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next((value for value in values if value is not None), None)
