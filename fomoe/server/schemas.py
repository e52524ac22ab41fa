"""The bodies of requests: types and ranges. Unknown fields are ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

MAX_INT = 2**31 - 1
MAX_CHOICES = 16
MAX_PROMPTS = 128
MAX_SEQUENCES = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_LOGPROBS = 20
MAX_BIASES = 4096

Tokens = Annotated[int, Field(ge=1, le=MAX_INT)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]


def _checked_stops(value: Any, check: Callable[[Any], Any]) -> Any:
    """Check `stop`; the errors of its two types, one by one, would say half of what is allowed."""
    try:
        return check(value)
    except ValidationError as error:
        # The last type that was tried is the list, so this is an item of it where one is wrong.
        wrong = error.errors()[-1]["input"]
        got = f"{len(value):,} strings" if isinstance(value, list) and wrong is value else ""
        raise PydanticCustomError(
            "stop",
            "give at most {strings} strings of at most {chars} characters each; got {got}",
            {"strings": MAX_STOPS, "chars": f"{MAX_STOP_CHARS:,}", "got": got or _told(wrong)},
        ) from None


def _told(value: Any) -> str:
    """Say what a value is that is no string, or too long a one."""
    if isinstance(value, str):
        is_long = len(value) > MAX_STOP_CHARS
        return f"one of {len(value):,} characters" if is_long else "half of a surrogate pair"
    names = {bool: "a boolean", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), "a number")


_Stop = Annotated[str, Field(max_length=MAX_STOP_CHARS)]
Stops = Annotated[
    _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None,
    WrapValidator(_checked_stops),
]


class Body(BaseModel):
    """Base of all bodies: JSON types are taken at their word, unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool | None = None


class GenerationBody(Body):
    """What chat and plain completions have in common."""

    model: str | None = Field(None, max_length=1000)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_completion_tokens: Tokens | None = None
    n_predict: int | None = Field(None, ge=-1, le=MAX_INT)
    min_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    temperature: float | None = Field(None, ge=0, le=5)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_INT)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_BIASES
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    stop: Stops = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_BIASES)] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    return_progress: bool | None = None
    quality: str | None = Field(None, max_length=100)
    car: float | None = Field(None, ge=0, le=1)
    response_format: dict[str, Any] | None = None


class ChatBody(GenerationBody):
    """Body of `/v1/chat/completions`; messages and tools are checked where they are rendered."""

    messages: list[Any]
    max_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=16)
    reasoning_effort: str | None = Field(None, max_length=20)


class CompletionBody(GenerationBody):
    """Body of `/v1/completions`; with `max_tokens` 0 and `echo` the prompt is only scored."""

    prompt: Any
    max_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    suffix: str | None = None
    parse_special: bool | None = None


class TokenizeBody(Body):
    """Body of `/tokenize`: text as llama.cpp (`content`) or vLLM (`prompt`) names it, or a chat."""

    content: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=16)
    add_generation_prompt: bool = True
    parse_special: bool = False
    with_pieces: bool = False


class DetokenizeBody(Body):
    """Body of `/detokenize`."""

    tokens: list[TokenId]
