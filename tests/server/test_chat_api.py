from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fake_engine import TIERS, CancellableEngine, FakeEngine
from server_harness import Server, frames, saying
from support.small_vocab import IM_END, small_tokenizer

from fomoe.engine.requests import SamplingParams
from fomoe.errors import RequestError

Serve = Callable[..., Server]


def text_of(values: list[Any], index: int = 0, field: str = "content") -> str:
    """The text that a stream's frames give to one choice."""
    assert values[-1] == "[DONE]"
    choices = [choice for value in values[:-1] for choice in value["choices"]]
    return "".join(c["delta"].get(field) or "" for c in choices if c["index"] == index)


def test_an_answer(serve: Serve) -> None:
    server = serve("Hello there")
    body = server.chat().json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello there"},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ]
    n = len(small_tokenizer().encode("Hello there"))
    prompt = server.engine.asked[0].prompt
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": n,
        "total_tokens": len(prompt) + n,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert body["timings"]["predicted_n"] == n
    assert body["timings"]["fomoe"]["hit"] == {"device": 6, "ram": 3, "nvme": 1}
    (receipt,) = server.receipts
    assert receipt.nvme_bytes == TIERS["nvme_bytes"]


def test_a_stream_is_the_same_answer(serve: Serve) -> None:
    server = serve("Grüße there")
    values = frames(server.chat(stream=True, stream_options={"include_usage": True}))
    assert values[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(values) == "Grüße there"
    finish, usage = values[-3], values[-2]
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert finish["timings"]["fomoe"]["mode"] == "exact"
    assert usage["choices"] == []
    whole = server.chat().json()
    assert usage["usage"] == whole["usage"]
    assert usage["timings"] == whole["timings"]
    assert len({value["id"] for value in values[:-1]}) == 1
    assert all(value["object"] == "chat.completion.chunk" for value in values[:-1])
    assert not any("usage" in value for value in frames(server.chat(stream=True))[:-1])


def test_several_choices(serve: Serve) -> None:
    said = {5: "one", 6: "two on", 7: "the"}
    server = serve(lambda request: saying(said[request.sampling.seed])(request))
    body = server.chat(n=3, seed=5).json()
    assert [c["message"]["content"] for c in body["choices"]] == ["one", "two on", "the"]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert body["usage"]["prompt_tokens"] == len(server.engine.asked[0].prompt)
    generated = sum(len(small_tokenizer().encode(text)) for text in said.values())
    assert body["usage"]["completion_tokens"] == generated
    assert body["timings"]["predicted_n"] == generated
    values = frames(server.chat(n=3, seed=5, stream=True))
    assert [text_of(values, i) for i in range(3)] == ["one", "two on", "the"]
    assert len(server.receipts) == 6


@pytest.mark.parametrize("engine", [FakeEngine, CancellableEngine])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "wanted"),
    [("ere li", "so th"), (["zzz", "ere li"], "so th"), (["re", "ere li"], "so the")],
)
def test_stop_strings_over_token_borders(
    serve: Serve, engine: Any, stream: bool, stop: Any, wanted: str
) -> None:
    fake = engine(saying("so there lies more and more and more"), delay=0.01)
    server = serve(engine=fake)
    response = server.chat(stop=stop, stream=stream)
    if stream:
        values = frames(response)
        assert text_of(values) == wanted
        last = values[-2]
    else:
        last = response.json()
        assert last["choices"][0]["message"]["content"] == wanted
    assert last["choices"][0]["finish_reason"] == "stop"
    assert fake.said < 10
    (receipt,) = server.receipts
    if engine is CancellableEngine:
        assert last["timings"]["fomoe"]["hit"]["device"] == 6
        assert (receipt.mode, receipt.nvme_bytes) == ("exact", TIERS["nvme_bytes"])
        assert fake.finished
    else:
        assert (receipt.mode, receipt.generated_tokens) == ("not measured", fake.said)
        assert fake.cancelled


def test_sampling_reaches_the_engine(serve: Serve) -> None:
    defaults = SamplingParams(temperature=0.6, top_k=20, presence_penalty=1.5)
    server = serve("a", sampling=defaults)
    server.chat(
        temperature=0,
        top_p=0.9,
        min_p=0.05,
        repeat_penalty=1.1,
        frequency_penalty=-0.5,
        logit_bias={"7": 2, "391": -100},
        seed=2**63 + 5,
        car=0.6,
        min_tokens=3,
        max_completion_tokens=9,
        stop_token_ids=[4],
        model="anything",
        unknown_field={"a": [1]},
        user="u",
        metadata=None,
    )
    request = server.engine.asked[0]
    assert request.sampling == SamplingParams(
        temperature=0.0,
        top_k=20,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=1.5,
        frequency_penalty=-0.5,
        logit_bias={7: 2.0, 391: -100.0},
        seed=5,
    )
    assert (request.quality, request.min_tokens, request.max_tokens) == ("car=0.6", 3, 9)
    assert request.stop_ids == small_tokenizer().eos_ids | {4}
    server.chat(top_k=-1, ignore_eos=True, repetition_penalty=1.2)
    request = server.engine.asked[1]
    assert (request.sampling.top_k, request.sampling.repetition_penalty) == (0, 1.2)
    assert request.stop_ids == frozenset()
    assert request.quality is None


def test_seeds_differ_unless_they_are_given(serve: Serve) -> None:
    server = serve("a")
    for seed in (None, None, -1):
        server.chat(seed=seed)
    seeds = {request.sampling.seed for request in server.engine.asked}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_car_mode_is_reported(serve: Serve) -> None:
    timings = serve("a").chat(car=0.6).json()["timings"]
    assert timings["fomoe"]["mode"] == "car=0.6"
    assert timings["fomoe"]["substituted"] == 2


def test_the_answer_is_clamped_to_the_context(serve: Serve) -> None:
    server = serve(saying("a" * 100, end=False), engine=None)
    server.engine.ctx_size = 40
    body = server.chat(max_tokens=32000).json()
    room = 40 - body["usage"]["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == server.engine.asked[0].max_tokens == room
    assert body["choices"][0]["finish_reason"] == "length"
    server.chat()
    assert server.engine.asked[1].max_tokens == room
    response = server.chat("long " * 40)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "exceed_context_size_error"
    assert (error["n_ctx"], error["n_prompt_tokens"] > 40) == (40, True)
    assert len(server.engine.asked) == 2


def test_logprobs(serve: Serve) -> None:
    server = serve("H\u0444")
    content = server.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    ids = small_tokenizer().encode("H\u0444")
    assert len(content) == len(ids) == 3
    assert content[0] == {
        "token": "H",
        "logprob": -ids[0] / 1000,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -ids[0] / 1000, "bytes": [72]},
            {"token": "I", "logprob": -(ids[0] + 1) / 1000, "bytes": [73]},
        ],
    }
    assert content[1]["token"] == "bytes:\\xd1"
    assert content[1]["bytes"] + content[2]["bytes"] == list("\u0444".encode())
    values = frames(server.chat(logprobs=True, top_logprobs=2, stream=True))
    streamed = [
        entry
        for value in values[:-1]
        if value["choices"][0]["logprobs"]
        for entry in value["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == content
    only = server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert only[0]["top_logprobs"] == []
    assert server.engine.asked[-1].logprobs == 0


def test_token_ids(serve: Serve) -> None:
    server = serve("Hello there")
    ids = small_tokenizer().encode("Hello there")
    body = server.chat(return_token_ids=True).json()
    assert body["choices"][0]["token_ids"] == ids
    assert body["prompt_token_ids"] == server.engine.asked[0].prompt
    values = frames(server.chat(return_token_ids=True, stream=True))
    assert [i for value in values[:-1] for i in value["choices"][0]["token_ids"]] == ids
    assert values[0]["prompt_token_ids"] == server.engine.asked[0].prompt
    assert "prompt_token_ids" not in values[1]


def test_progress(serve: Serve) -> None:
    server = serve("a")
    values = frames(server.chat(return_progress=True, stream=True))
    shown = [value["prompt_progress"] for value in values[:-1] if "prompt_progress" in value]
    total = len(server.engine.asked[0].prompt)
    assert shown == [
        {"total": total, "cache": 1, "processed": done, "time_ms": 5.0}
        for done in (total // 2, total)
    ]
    assert not any("prompt_progress" in v for v in frames(server.chat(stream=True))[:-1])


@pytest.mark.parametrize(
    ("said", "options", "reasoning", "content"),
    [
        ("why\n</think>\n\nso", {"enable_thinking": True}, "why", "so"),
        ("why", {"enable_thinking": "true"}, "why", ""),
        ("so</think>", {"enable_thinking": False}, "", "so</think>"),
        ("<think>\nwhy\n</think>\n\nso", {}, "why", "so"),
        ("so", {}, "", "so"),
    ],
)
def test_thinking_is_told_apart(
    serve: Serve, said: str, options: dict[str, Any], reasoning: str, content: str
) -> None:
    server = serve(said)
    body = server.chat(chat_template_kwargs=options).json()
    message = body["choices"][0]["message"]
    assert message["content"] == content
    assert message.get("reasoning_content", "") == reasoning
    details = body["usage"]["completion_tokens_details"]
    assert bool(details["reasoning_tokens"]) == bool(reasoning)
    values = frames(server.chat(chat_template_kwargs=options, stream=True))
    assert text_of(values) == content
    assert text_of(values, field="reasoning_content") == reasoning


def test_effort_none_switches_thinking_off(serve: Serve) -> None:
    server = serve("a")
    server.chat(reasoning_effort="none")
    assert small_tokenizer().decode(server.engine.asked[0].prompt).endswith("</think>\n\n")
    server.chat(reasoning_effort="high")
    assert small_tokenizer().decode(server.engine.asked[1].prompt).endswith("assistant\n")


def test_tools_reach_the_template(serve: Serve) -> None:
    server = serve("a")
    tool = {"type": "function", "function": {"name": "look", "parameters": {"$schema": "x"}}}
    for choice, shown in ((None, True), ("auto", True), ("none", False)):
        server.chat(tools=[tool], tool_choice=choice)
        prompt = small_tokenizer().decode(server.engine.asked[-1].prompt)
        assert ('"name": "look"' in prompt) == shown


def test_a_failure_is_an_error_and_not_an_answer(serve: Serve) -> None:
    server = serve(engine=FakeEngine(saying("Hello there"), fail_after=2))
    response = server.chat()
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the disk is on fire"
    values = frames(server.chat(stream=True))
    assert values[-1] == {
        "error": {
            "message": "the disk is on fire",
            "type": "server_error",
            "param": None,
            "code": 500,
        }
    }
    assert "".join(v["choices"][0]["delta"].get("content", "") for v in values[:-1]) == "He"
    assert server.receipts == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_by_the_engine_is_a_status(serve: Serve, stream: bool) -> None:
    refusal = RequestError("too busy", "prompt", status=429)
    response = serve(engine=FakeEngine(saying("a"), fail_first=refusal)).chat(stream=stream)
    assert response.status_code == 429
    assert response.json()["error"] == {
        "message": "too busy",
        "type": "rate_limit_error",
        "param": "prompt",
        "code": 429,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_failure_keeps_its_text_to_itself(serve: Serve, stream: bool) -> None:
    failure = ValueError("secret path /x")
    response = serve(engine=FakeEngine(saying("a"), fail_first=failure)).chat(stream=stream)
    assert response.status_code == 500
    assert "secret" not in response.text


def test_a_receipt_that_cannot_be_reported_harms_nobody(serve: Serve) -> None:
    def broken(_receipt: object) -> None:
        raise BrokenPipeError

    assert serve("a", on_answer=broken).chat().status_code == 200


def test_special_tokens_are_not_shown(serve: Serve) -> None:
    server = serve(lambda request: [*small_tokenizer().encode("a"), 385, IM_END])
    assert server.chat().json()["choices"][0]["message"]["content"] == "a"
