from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_harness import Server, frames

from fomoe.server.tool_calls import ToolCallParser

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "properties": {
                "n": {"type": "integer"},
                "on": {"type": "boolean"},
                "list": {"type": "array"},
                "text": {"type": "string"},
                "any": {},
            }
        },
    },
}
TAGS = (
    "<tool_call>\n<function=look>\n<parameter=n>\n7\n</parameter>\n<parameter=on>\nTrue\n"
    '</parameter>\n<parameter=list>\n["é", 1]\n</parameter>\n<parameter=text>\n7\nlines\n\n'
    "</parameter>\n<parameter=other>\n8\n</parameter>\n</function>\n</tool_call>"
)
TAGS_ARGUMENTS = {"n": 7, "on": True, "list": ["é", 1], "text": "7\nlines\n", "other": "8"}
BAD_JSON = '<tool_call>{"name": "f", "arguments": 1}</tool_call>'
AS_JSON = '<tool_call>\n{"name": "look", "arguments": {"n": 7}}\n</tool_call>'


def parsed(text: str, cuts: list[int]) -> tuple[str, list[tuple[str, Any]]]:
    parser = ToolCallParser([TOOL])
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    shown, calls = "", []
    for begin, end in pairwise(edges):
        more, found = parser.push(text[begin:end])
        shown += more
        calls += found
    assert [call["index"] for call in calls] == list(range(parser.n_calls))
    assert len({call["id"] for call in calls}) == len(calls)
    return shown + parser.finish(), [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls
    ]


@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        (TAGS, "", [("look", TAGS_ARGUMENTS)]),
        (AS_JSON, "", [("look", {"n": 7})]),
        (
            f"I look.\n\n{TAGS}\n{AS_JSON}\n",
            "I look.\n\n",
            [("look", TAGS_ARGUMENTS), ("look", {"n": 7})],
        ),
        ("<tool_call>\n<function=new>\n</function>\n</tool_call>", "", [("new", {})]),
        ("plain <tool_cal text", "plain <tool_cal text", []),
        ("<tool_call>nonsense</tool_call> and on", "<tool_call>nonsense</tool_call> and on", []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        (
            '<tool_call>{"name": "f", "arguments": 1}</tool_call>',
            '<tool_call>{"name": "f", "arguments": 1}</tool_call>',
            [],
        ),
        ("<tool_call>\n<function=look>\n<par", "<tool_call>\n<function=look>\n<par", []),
    ],
)
@given(cuts=st.lists(st.integers(0, 300), max_size=6))
def test_calls_are_read_however_they_arrive(
    text: str, shown: str, calls: list[Any], cuts: list[int]
) -> None:
    assert parsed(text, cuts) == (shown, calls)


def test_calls_reach_the_client(serve: Callable[..., Server], tool_template: Any) -> None:
    text = f"I look.\n\n{TAGS}"
    server = serve(text, template=tool_template)
    choice = server.chat(tools=[TOOL]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look.\n\n"
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == TAGS_ARGUMENTS
    values = frames(server.chat(tools=[TOOL], stream=True))
    (streamed,) = [c for v in values[:-1] for c in v["choices"][0]["delta"].get("tool_calls", [])]
    assert streamed["function"] == call["function"]
    assert values[-2]["choices"][0]["finish_reason"] == "tool_calls"
    # The client can send the call back as it came.
    assistant = {"role": "assistant", **choice["message"]}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "seen"}
    user = {"role": "user", "content": "Hi"}
    body = {"messages": [user, assistant, result], "tools": [TOOL]}
    assert server.post("/v1/chat/completions", body).status_code == 200


def test_without_tools_calls_are_text(serve: Callable[..., Server], tool_template: Any) -> None:
    for options in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        choice = serve(TAGS, template=tool_template).chat(**options).json()["choices"][0]
        assert choice["message"]["content"] == TAGS
        assert choice["finish_reason"] == "stop"


def test_a_call_that_is_cut_short_is_text(serve: Callable[..., Server], tool_template: Any) -> None:
    server = serve(TAGS, template=tool_template)
    choice = server.chat(tools=[TOOL], max_tokens=8).json()["choices"][0]
    assert TAGS.startswith(choice["message"]["content"])
    assert len(choice["message"]["content"]) > 10
    assert choice["finish_reason"] == "length"
    values = frames(server.chat(tools=[TOOL], max_tokens=8, stream=True))
    shown = "".join(v["choices"][0]["delta"].get("content", "") for v in values[:-1])
    assert shown == choice["message"]["content"]
