from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from fake_engine import FakeEngine
from server_harness import Server, frames, saying
from support.small_vocab import IM_END, IM_START, small_tokenizer

from fomoe.engine.requests import GenerateRequest, TokenEvent
from fomoe.server.logprobs import CompletionLogprobs

Serve = Callable[..., Server]


def test_a_completion(serve: Serve) -> None:
    server = serve(" there")
    body = server.complete("Hello").json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": " there", "logprobs": None, "finish_reason": "stop"}
    ]
    assert server.engine.asked[0].prompt == small_tokenizer().encode("Hello")
    assert server.engine.asked[0].max_tokens == 16


def test_prompts_come_in_four_shapes(serve: Serve) -> None:
    server = serve(lambda request: [request.prompt[-1], IM_END])
    encode = small_tokenizer().encode
    for prompt, prompts in [
        ("ab", [encode("ab")]),
        ([5, 6], [[5, 6]]),
        (["ab", "c"], [encode("ab"), encode("c")]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["ab", [7]], [encode("ab"), [7]]),
    ]:
        server.engine.asked.clear()
        body = server.complete(prompt, n=2).json()
        asked = sorted(server.engine.asked, key=lambda r: int(r.request_id.rpartition("-")[2]))
        assert [r.prompt for r in asked] == [p for p in prompts for _ in range(2)]
        texts = [small_tokenizer().decode(p[-1:]) for p in prompts for _ in range(2)]
        assert [c["text"] for c in body["choices"]] == texts
        assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_special_strings_in_a_prompt_are_text_unless_asked_for(serve: Serve) -> None:
    server = serve("a")
    server.complete("<|im_start|>user")
    assert IM_START not in server.engine.asked[0].prompt
    server.complete("<|im_start|>user", parse_special=True)
    assert server.engine.asked[1].prompt[0] == IM_START


def test_scoring_as_lm_eval_does_it(serve: Serve) -> None:
    server = serve(saying("xyz", end=False))
    prompts = [[5, 6, 7], [8, 9]]
    body = server.complete(
        prompts, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    ).json()
    for prompt, choice in zip(prompts, body["choices"], strict=True):
        new = small_tokenizer().encode("x")
        ids = prompt + new
        lists = choice["logprobs"]
        decode = small_tokenizer().decode
        assert lists["tokens"] == [decode([i]) for i in ids]
        assert lists["token_logprobs"] == [None, *(-i / 1000 for i in ids[1:])]
        assert lists["top_logprobs"][0] is None
        assert [list(d.values()) for d in lists["top_logprobs"][1:]] == [
            [-i / 1000] for i in ids[1:]
        ]
        assert lists["text_offset"] == list(range(len(ids)))
        assert choice["text"] == decode(ids)
    assert all(request.echo for request in server.engine.asked)


def check_offsets(choice: dict[str, Any], ids: list[int]) -> None:
    """Every offset is where the token's text begins, or the character that it is a part of."""
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    for token, offset in zip(ids, offsets, strict=True):
        raw = small_tokenizer().token_bytes(token)
        own = small_tokenizer().decode([token])
        assert raw in text[offset].encode() if "\ufffd" in own else text.startswith(own, offset)


def test_offsets_count_characters_that_span_tokens_once(serve: Serve) -> None:
    prompt = "a 🦊 fox éü"
    ids = small_tokenizer().encode(prompt)
    choice = serve("b").complete(prompt, echo=True, logprobs=0, max_tokens=0).json()["choices"][0]
    assert choice["text"] == prompt
    check_offsets(choice, ids)
    fox = small_tokenizer().encode("🦊")
    at = next(i for i in range(len(ids)) if ids[i : i + len(fox)] == fox)
    assert len(fox) == 4
    assert choice["logprobs"]["text_offset"][at : at + 5] == [2, 2, 2, 2, 3]


def test_offsets_go_on_from_the_prompt_over_the_parts_of_a_stream(serve: Serve) -> None:
    said = small_tokenizer().encode(" 🦊é<")
    half = small_tokenizer().encode("🦊")[:2]
    # A prompt and an answer that end inside a character, and a control token without text.
    script = [*said, IM_START, *said, *half]
    prompt = small_tokenizer().encode("Grüße 🦊") + half
    server = serve(lambda request: script)
    options: dict[str, Any] = {"echo": True, "logprobs": 0, "max_tokens": 50, "ignore_eos": True}
    whole = server.complete(prompt, **options).json()["choices"][0]
    assert whole["text"] == "Grüße 🦊\ufffd 🦊é< 🦊é<\ufffd"
    starts = [8, 9, 9, 9, 9, 10, 11, 12, 12, 13, 13, 13, 13, 14, 15, 16, 16]
    assert whole["logprobs"]["text_offset"][len(prompt) :] == starts
    values = frames(server.complete(prompt, **options, stream=True))
    parts = [part["logprobs"] or {} for v in values[:-1] for part in v["choices"]]
    streamed = [offset for part in parts for offset in part.get("text_offset", [])]
    assert streamed == whole["logprobs"]["text_offset"]
    without = server.complete(prompt, **options | {"echo": False}).json()["choices"][0]
    assert without["logprobs"]["text_offset"] == [start - 8 for start in starts]


def test_only_scoring(serve: Serve) -> None:
    server = serve("abc")
    server.engine.ctx_size = 3
    body = server.complete([5, 6, 7], echo=True, logprobs=0, max_tokens=0).json()
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.006, -0.007]
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0
    assert server.complete([5, 6, 7], max_tokens=1).json()["error"]["n_prompt_tokens"] == 3


def test_an_echo_needs_no_logprobs(serve: Serve) -> None:
    server = serve("b")
    assert server.complete("a", echo=True).json()["choices"][0]["text"] == "ab"
    assert server.engine.asked[0].echo is False


def test_a_stream_is_the_same_completion(serve: Serve) -> None:
    server = serve("Grüße")
    options: dict[str, Any] = {
        "echo": True,
        "logprobs": 2,
        "return_token_ids": True,
        "n": 2,
        "return_progress": True,
        "stream_options": {"include_usage": True},
    }
    whole = server.complete("ab c", **options).json()
    values = frames(server.complete("ab c", **options, stream=True))
    for index in range(2):
        parts = [c for v in values[:-1] for c in v["choices"] if c["index"] == index]
        lists: dict[str, list[Any]] = {}
        for part in parts:
            for name, some in (part["logprobs"] or {}).items():
                lists.setdefault(name, []).extend(some)
        assert "".join(part["text"] for part in parts) == whole["choices"][index]["text"]
        assert lists == whole["choices"][index]["logprobs"]
        assert [i for p in parts for i in p["token_ids"]] == whole["choices"][index]["token_ids"]
        assert parts[-1]["finish_reason"] == "stop"
    assert values[-2]["usage"] == whole["usage"]
    assert sum("prompt_progress" in value for value in values[:-1]) == 4


def test_a_stop_string_cuts_the_log_probabilities_too(serve: Serve) -> None:
    server = serve("in the on")
    choice = server.complete("a", logprobs=0, stop="he o", return_token_ids=True).json()["choices"][
        0
    ]
    assert choice["text"] == "in t"
    assert choice["logprobs"]["tokens"] == ["in", " the"]
    assert choice["token_ids"] == small_tokenizer().encode("in the")


def test_impossible_tokens_have_a_log_probability_that_json_can_hold() -> None:
    event = TokenEvent(request_id="r", token=5, logprob=-math.inf, top=[(6, -0.5), (5, -math.inf)])
    lists = CompletionLogprobs(small_tokenizer()).generated([event])
    assert lists["token_logprobs"] == [-9999.0]
    assert list(lists["top_logprobs"][0].values()) == [-0.5, -9999.0]


def test_few_prompts_at_a_time_go_to_the_engine(serve: Serve) -> None:
    most = 0

    def script(request: GenerateRequest) -> list[int]:
        nonlocal most
        most = max(most, len(engine.running))
        return [5, IM_END]

    engine = FakeEngine(script, delay=0.002)
    assert len(serve(engine=engine).complete(["a"] * 40).json()["choices"]) == 40
    assert most == 4


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "no tokens"),
        ([], "must be a string"),
        ([[]], "no tokens"),
        ([1, "a"], "must be a string"),
        ([True], "must be a string"),
        ([1.5], "must be a string"),
        ({"a": 1}, "must be a string"),
        (None, "must be a string"),
        ([392], "token id 392 is outside 0 to 391"),
        ([-1], "token id -1 is outside"),
        (["a"] * 129, "129 prompts, at most 128"),
        ("\udc00", "half of a surrogate pair"),
    ],
)
def test_other_prompts_are_refused(serve: Serve, prompt: Any, message: str) -> None:
    response = serve("a").complete(prompt)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
