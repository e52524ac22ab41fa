"""Requests made of anything: an answer or a refusal in OpenAI's shape, never a failure."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from server_harness import Server, saying

from fomoe.model.chat import ChatTemplate

Serve = Callable[..., Server]
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
)
ALLOWED_ABOVE_500 = {501, 503}

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 0.5, -0.0, 1e308]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["", "user", "system", "<|im_end|>", "\ud800", "text", "none"]),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
FUNCTIONS = st.fixed_dictionaries({}, optional={"name": SCALARS, "arguments": ANYTHING})
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["user", "assistant", "tool", "system", "developer"]),
                "content": st.one_of(
                    st.text(max_size=10),
                    ANYTHING,
                    st.lists(st.fixed_dictionaries({"type": SCALARS, "text": SCALARS}), max_size=2),
                ),
            },
            optional={
                "tool_calls": st.one_of(
                    ANYTHING, st.lists(st.fixed_dictionaries({"function": FUNCTIONS}), max_size=2)
                ),
                "reasoning_content": SCALARS,
                "name": SCALARS,
            },
        ),
        ANYTHING,
    ),
    max_size=3,
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "messages": st.one_of(st.just(CHAT["messages"]), MESSAGES, ANYTHING),
    "prompt": st.one_of(st.text(max_size=10), st.lists(st.integers(-1, 400), max_size=4), ANYTHING),
    "content": SCALARS,
    "tokens": st.one_of(st.lists(st.integers(-1, 400), max_size=4), ANYTHING),
    "stream": st.booleans(),
    "echo": st.booleans(),
    "logprobs": st.one_of(st.booleans(), st.integers(0, 5), SCALARS),
    "top_logprobs": st.one_of(st.integers(0, 5), SCALARS),
    "stop": st.one_of(st.text(max_size=3), st.lists(st.text(max_size=3), max_size=3), ANYTHING),
    "n": st.one_of(st.integers(1, 3), SCALARS),
    "logit_bias": st.one_of(
        st.dictionaries(st.integers(-1, 400).map(str), st.floats(-101, 101), max_size=3), ANYTHING
    ),
    "tools": st.one_of(
        st.lists(st.fixed_dictionaries({"function": FUNCTIONS}), max_size=2), ANYTHING
    ),
}
FIELDS |= dict.fromkeys(
    [
        "max_tokens",
        "max_completion_tokens",
        "n_predict",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "seed",
        "stop_token_ids",
        "ignore_eos",
        "return_token_ids",
        "return_progress",
        "car",
        "quality",
        "response_format",
        "model",
        "stream_options",
        "tool_choice",
        "chat_template_kwargs",
        "reasoning_effort",
        "suffix",
        "parse_special",
        "best_of",
        "add_generation_prompt",
        "with_pieces",
        "something_else",
    ],
    ANYTHING,
)
BODIES = st.fixed_dictionaries(
    {"messages": FIELDS["messages"], "prompt": FIELDS["prompt"]},
    optional={name: one for name, one in FIELDS.items() if name not in ("messages", "prompt")},
)


GETS = ("/health", "/ready", "/metrics", "/v1/models", "/openapi.json")
HEADERS = st.sampled_from(["authorization", "host", "content-length", "accept", "x-api-key"])


@pytest.fixture(scope="module")
def server(template: ChatTemplate) -> Server:
    return Server(FakeEngine(saying("Hé there")), template)


@pytest.fixture(scope="module")
def locked(template: ChatTemplate) -> Server:
    return Server(FakeEngine(saying("a")), template, api_key="k")


@settings(max_examples=120, deadline=None)
@given(body=BODIES, path=st.sampled_from(PATHS))
def test_no_body_makes_the_server_fail(server: Server, body: Any, path: str) -> None:
    check(server, path, json.dumps(body).encode())


@settings(max_examples=80, deadline=None)
@given(
    body=st.one_of(st.binary(max_size=60), ANYTHING.map(lambda value: json.dumps(value).encode())),
    path=st.sampled_from(PATHS),
)
def test_no_bytes_make_the_server_fail(server: Server, body: bytes, path: str) -> None:
    check(server, path, body)


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"]),
    path=st.one_of(
        st.sampled_from([*GETS, *PATHS]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=10).map(
            lambda text: "/v1/models/" + quote(text)
        ),
    ),
    headers=st.dictionaries(HEADERS, st.binary(max_size=10), max_size=2),
)
def test_no_request_line_makes_the_server_fail(
    locked: Server, method: str, path: str, headers: dict[str, bytes]
) -> None:
    assert locked.call(method, path, headers=headers).status_code < 500


def check(server: Server, path: str, body: bytes) -> None:
    """Send a body; whatever is refused is refused in OpenAI's shape, a stream ends properly."""
    headers = {"content-type": "application/json"}
    response = server.call("POST", path, content=body, headers=headers)
    status = response.status_code
    assert status < 500 or status in ALLOWED_ABOVE_500, response.text
    if status != 200:
        error = response.json()["error"]
        assert error["message"]
        assert (error["code"], isinstance(error["type"], str)) == (status, True)
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        assert isinstance(response.json(), dict)


def test_a_storm_of_bodies_leaves_nothing_behind(serve: Serve) -> None:
    server = serve("Hello there", max_pending=10_000)

    async def storm() -> set[int]:
        async with server.client() as client:
            bodies = [CHAT | {"stream": bool(i % 2), "n": 1 + i % 3} for i in range(100)]
            calls = [client.post("/v1/chat/completions", json=body) for body in bodies]
            codes = {response.status_code for response in await asyncio.gather(*calls)}
            assert len(asyncio.all_tasks()) == 1
            return codes

    assert asyncio.run(storm()) == {200}
    assert not server.engine.running
