"""What clients send by mistake: refusals that name the field, and what is taken nevertheless."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from server_harness import Server

Serve = Callable[..., Server]
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", "Hi"),
        ("messages", None),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        ("temperature", "0.5"),
        ("temperature", -0.1),
        ("temperature", 5.1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repeat_penalty", -1),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1²": 1}),
        ("logit_bias", {"392": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", [5]),
        ("seed", 2**64),
        ("seed", "7"),
        ("n", 0),
        ("n", 17),
        ("n", True),
        ("best_of", 2),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 2**31),
        ("max_tokens", "5"),
        ("max_completion_tokens", 1.5),
        ("n_predict", -2),
        ("min_tokens", -1),
        ("stop", 5),
        ("stop", ["a"] * 17),
        ("stop", ["a" * 1001]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [392]),
        ("logprobs", 1),
        ("top_logprobs", 21),
        ("top_logprobs", 2),
        ("stream", "yes"),
        ("stream_options", True),
        ("ignore_eos", 1),
        ("car", 1.5),
        ("car", "on"),
        ("quality", "best"),
        ("quality", "kl=0"),
        ("quality", "bytes=0.5GB/s"),
        ("quality", 0.5),
        ("quality", {"kl": 0.01}),
        ("quality", "kl=" + "0" * 100),
        ("tools", {}),
        ("tools", [1]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a"}}),
        ("chat_template_kwargs", {"chat_template": "x"}),
        ("chat_template_kwargs", {"add_generation_prompt": False}),
        ("chat_template_kwargs", {"enable_thinking": "maybe"}),
        ("reasoning_effort", "enormous"),
        ("model", 5),
    ],
)
def test_wrong_values_are_refused_by_name(serve: Serve, field: str, value: Any) -> None:
    server = serve("a")
    response = server.post("/v1/chat/completions", CHAT | {field: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(field)
    assert error["code"] == 400
    assert server.engine.asked == []


@pytest.mark.parametrize(
    ("stop", "got"),
    [
        (["a"] * 17, "17 strings"),
        ("a" * 1001, "one of 1,001 characters"),
        (["a", "b" * 2000], "one of 2,000 characters"),
        ([1], "a number"),
        (["a", None], "null"),
        ([["a"]], "a list"),
        (["a", "\ud800"], "half of a surrogate pair"),
        (True, "a boolean"),
        ({"a": "b"}, "an object"),
    ],
)
def test_stops_are_refused_with_what_is_allowed(serve: Serve, stop: Any, got: str) -> None:
    error = serve("a").complete(stop=stop).json()["error"]
    allowed = "give at most 16 strings of at most 1,000 characters each"
    assert error["message"] == f"stop: {allowed}; got {got}"
    assert error["param"] == "stop"


def test_stops_at_the_limits_are_taken(serve: Serve) -> None:
    for stop in ("", "a" * 1000, [], [""], ["a" * 1000] * 16, None):
        assert serve("b").complete(stop=stop).status_code == 200


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("tool_choice", 5, "tool_choice"),
        ("tool_choice", ["auto"], "tool_choice"),
        ("stop_token_ids", [1, "a"], "stop_token_ids.1"),
        ("logit_bias", {"5": "a"}, "logit_bias.5"),
        ("stream_options", {"include_usage": "yes"}, "stream_options.include_usage"),
        ("tools", "f", "tools"),
        ("messages", [{"role": "user", "content": 5}], "messages.0.content"),
        ("messages", [{"role": "user", "content": ["a", {}]}], "messages.0.content.1"),
    ],
)
def test_a_field_is_named_as_the_client_wrote_it(
    serve: Serve, field: str, value: Any, param: str
) -> None:
    error = serve("a").post("/v1/chat/completions", CHAT | {field: value}).json()["error"]
    assert error["param"] == param


def test_the_fields_of_other_bodies_are_named_too(serve: Serve) -> None:
    server = serve("a")
    for path, body, param in [
        ("/v1/chat/completions", {}, "messages"),
        ("/v1/completions", {"body": 1}, "prompt"),
        ("/v1/completions", {"prompt": {"a": 1}}, "prompt"),
        ("/v1/completions", {"prompt": [1, "a"]}, "prompt"),
        ("/detokenize", {"tokens": [1, "a"]}, "tokens.1"),
        ("/tokenize", {"content": ["a"]}, "content"),
    ]:
        assert server.post(path, body).json()["error"]["param"] == param


def test_the_choices_that_constrain_nothing_are_taken(serve: Serve) -> None:
    for field, value in [
        ("response_format", {"type": "text"}),
        ("tool_choice", "auto"),
        ("tool_choice", "none"),
        ("best_of", 1),
        ("a_field_of_tomorrow", 1),
    ]:
        assert serve("a").post("/v1/chat/completions", CHAT | {field: value}).status_code == 200


def test_text_behind_the_answer_is_refused(serve: Serve) -> None:
    response = serve("a").complete(suffix="b")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "suffix"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "must be a JSON object"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"messages": [' + b"[" * 100_000, "the body"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the body"),
        (b'{"messages": NaN}', "messages"),
        (b"\xff\xfe{}", "the body"),
        (b'{"temperature": 1e999, "messages": []}', "temperature"),
    ],
)
def test_bodies_that_are_no_json_object_are_refused(
    serve: Serve, body: bytes, message: str
) -> None:
    headers = {"content-type": "application/json"}
    response = serve("a").call("POST", "/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_other_methods_and_paths(serve: Serve) -> None:
    server = serve("a")
    assert server.call("GET", "/v1/chat/completions").status_code == 405
    assert server.call("GET", "/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert server.call("GET", "/health/").status_code == 404


def test_what_is_null_is_as_if_it_were_not_there(serve: Serve) -> None:
    server = serve("a")
    names = server.app.openapi()["components"]["schemas"]["ChatBody"]["properties"]
    body = dict.fromkeys(names) | CHAT
    assert server.post("/v1/chat/completions", body).status_code == 200
    assert len(names) > 25


def test_every_number_has_bounds(serve: Serve) -> None:
    schemas = serve("a").app.openapi()["components"]["schemas"]
    checked = 0

    def walk(node: Any, path: str) -> None:
        nonlocal checked
        if isinstance(node, dict):
            if node.get("type") in ("integer", "number"):
                low = {"minimum", "exclusiveMinimum"} & node.keys()
                high = {"maximum", "exclusiveMaximum"} & node.keys()
                assert low, path
                assert high, path
                checked += 1
            for name, child in node.items():
                walk(child, f"{path}.{name}")
        elif isinstance(node, list):
            for child in node:
                walk(child, path)

    for name in ("ChatBody", "CompletionBody", "TokenizeBody", "DetokenizeBody"):
        walk(schemas[name], name)
    assert checked > 35


def test_a_threshold_beside_a_contract_is_refused(serve: Serve) -> None:
    body = CHAT | {"quality": "exact", "car": 0.5}
    response = serve("a").post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "quality"
