"""What the server is told when it is made."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fomoe.engine.requests import PromptProgress, Receipt, SamplingParams


def _ignore(_what: Receipt | PromptProgress) -> None:
    """Take a receipt or a progress and do nothing with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """The model as clients see it, and the limits of the server.

    Attributes:
        model_id: Name under which the model is offered.
        n_params: Parameters of the model, None where unknown.
        size_bytes: Bytes of the model's files, None where unknown.
        n_ctx_train: Tokens of context that the model was trained with, None where unknown.
        created: Unix time that `/v1/models` shows.
        api_key: Secret that every route but `/health` asks for; None asks for none.
        allowed_hosts: Names that the Host header may hold besides those of this machine's
            loopback; None allows any, which is for servers that listen on a network address.
        sampling: Values for what a request leaves out; its seed is not used.
        max_pending: Requests under way or waiting, above which new ones get status 429.
        max_body_bytes: Largest request body.
        retry_after_s: Seconds that a refused client is told to wait.
        ping_s: Longest silence of a stream.
        stall_s: Seconds after which a client that does not read is given up.
        on_answer: Called with the receipt of every finished answer.
        on_progress: Called with each news of a prompt.
    """

    model_id: str
    n_params: int | None = None
    size_bytes: int | None = None
    n_ctx_train: int | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] | None = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_pending: int = 64
    max_body_bytes: int = 16 << 20
    retry_after_s: int = 5
    ping_s: float = 4.0
    stall_s: float = 30.0
    on_answer: Callable[[Receipt], None] = _ignore
    on_progress: Callable[[PromptProgress], None] = _ignore
