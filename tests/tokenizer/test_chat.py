from __future__ import annotations

import copy
import gc
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_gguf import metadata_of
from support.small_vocab import END_OF_TEXT, IM_END, IM_START, small_tokenizer, small_values

from fomoe.errors import GGUFError, RequestError
from fomoe.model.chat import ChatTemplate
from fomoe.model.chat_messages import MAX_DEPTH
from fomoe.model.chat_render import RenderLimits, TemplateError, TemplateRenderer

Messages = list[dict[str, Any]]
USER: Messages = [{"role": "user", "content": "Hi"}]


def template_of(source: str, **options: Any) -> ChatTemplate:
    values = small_values() | {"tokenizer.chat_template": source}
    return ChatTemplate.from_gguf(metadata_of(values), small_tokenizer(), **options)


@pytest.fixture(scope="module")
def chatml() -> Iterator[ChatTemplate]:
    template = ChatTemplate.from_gguf(metadata_of(small_values()), small_tokenizer())
    yield template
    template.close()


@pytest.fixture(scope="module")
def dump() -> Iterator[ChatTemplate]:
    """A template that writes its variables out as JSON."""
    template = template_of("{{ [messages, tools, enable_thinking] | tojson }}</think>")
    yield template
    template.close()


def seen(template: ChatTemplate, messages: Any, **options: Any) -> tuple[Messages, Any, Any]:
    """The (messages, tools, enable_thinking) that a template is given."""
    ids = template.prompt_ids(messages, **{"enable_thinking": True} | options)
    text = small_tokenizer().decode(ids).removesuffix("</think>")
    messages, tools, thinking = json.loads(text)
    return messages, tools, thinking


def test_a_file_without_a_template_gets_chatml(chatml: ChatTemplate) -> None:
    plain = small_tokenizer().encode
    assert chatml.prompt_ids([{"role": "system", "content": "Be brief"}, *USER]) == [
        *(IM_START, *plain("system\nBe brief"), IM_END, *plain("\n")),
        *(IM_START, *plain("user\nHi"), IM_END, *plain("\n")),
        *(IM_START, *plain("assistant\n")),
    ]
    assert chatml.prompt_ids(USER, add_generation_prompt=False)[-2] == IM_END


def test_a_model_without_template_and_marks_is_refused_for_chat() -> None:
    types = [1 if kind == 1 else 5 for kind in small_values()["tokenizer.ggml.token_type"]]
    metadata = metadata_of(small_values(token_type=types))
    tokenizer = small_tokenizer().from_gguf(metadata)
    with pytest.raises(RequestError, match="no chat template; use /v1/completions"):
        ChatTemplate.from_gguf(metadata, tokenizer).prompt_ids(USER)


def test_bos_comes_first_and_once() -> None:
    values = small_values(add_bos_token=True)
    tokenizer = small_tokenizer().from_gguf(metadata_of(values))
    for source in ("{{ messages[0].content }}", "{{ bos_token + messages[0].content }}"):
        metadata = metadata_of(values | {"tokenizer.chat_template": source})
        template = ChatTemplate.from_gguf(metadata, tokenizer)
        assert template.prompt_ids(USER) == [END_OF_TEXT, *tokenizer.encode("Hi")]
        template.close()


ROLES_CASES: list[tuple[str, Messages, Messages]] = [
    (
        "developer is system",
        [{"role": "developer", "content": "d"}, *USER],
        [{"role": "system", "content": "d"}, *USER],
    ),
    (
        "late system messages join the first",
        [
            {"role": "system", "content": "a"},
            *USER,
            {"role": "developer", "content": "b"},
            {"role": "assistant", "content": "x"},
            {"role": "system", "content": "c"},
        ],
        [
            {"role": "system", "content": "a\n\nb\n\nc"},
            *USER,
            {"role": "assistant", "content": "x"},
        ],
    ),
    (
        "parts are joined",
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "a"},
                    "b",
                    {"type": "input_text", "text": "c"},
                ],
            }
        ],
        [{"role": "user", "content": "abc"}],
    ),
    (
        "tool arguments are parsed",
        [
            *USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"b": 1, "a": [2]}'},
                    },
                    {"function": {"name": "g", "arguments": {"x": "y"}}},
                    {"function": {"name": "h", "arguments": " "}},
                    {"function": {"name": "i"}},
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "r", "surprise": 1},
        ],
        [
            *USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "type": "function",
                        "function": {"name": "f", "arguments": {"b": 1, "a": [2]}},
                        "id": "1",
                    },
                    {"type": "function", "function": {"name": "g", "arguments": {"x": "y"}}},
                    {"type": "function", "function": {"name": "h", "arguments": {}}},
                    {"type": "function", "function": {"name": "i", "arguments": {}}},
                ],
            },
            {"role": "tool", "content": "r", "tool_call_id": "1"},
        ],
    ),
    (
        "thinking is taken out of the content",
        [*USER, {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nso"}],
        [*USER, {"role": "assistant", "content": "so", "reasoning_content": "why"}],
    ),
    (
        "reasoning goes by three names",
        [*USER, {"role": "assistant", "content": "so", "reasoning": "why"}],
        [*USER, {"role": "assistant", "content": "so", "reasoning_content": "why"}],
    ),
]


@pytest.mark.parametrize(("name", "sent", "wanted"), ROLES_CASES, ids=[c[0] for c in ROLES_CASES])
def test_messages_are_normalised(
    dump: ChatTemplate, name: str, sent: Messages, wanted: Messages
) -> None:
    before = copy.deepcopy(sent)
    assert seen(dump, sent)[0] == wanted
    assert sent == before


@pytest.mark.parametrize(
    ("sent", "param", "message"),
    [
        ([], "messages", "at least one message"),
        ([{"role": "system", "content": "a"}], "messages", "only system messages"),
        ([{"role": "robot", "content": "a"}], "messages.0.role", "must be one of system, dev"),
        ([{"content": "a"}], "messages.0.role", "must be one of"),
        (["hello"], "messages.0", "must be an object"),
        ([{"role": "user"}], "messages.0.content", "a string or a list of text parts"),
        ([{"role": "user", "content": 1}], "messages.0.content", "a string or a list"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
            "messages.0.content.0",
            "'image_url'; images, audio and files are not supported",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0", "only text"),
        ([{"role": "user", "content": "\udc00"}], "messages", r"U\+DC00"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "messages.0.tool_calls.0.function.arguments",
            "not valid JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "1"}}]}],
            "messages.0.tool_calls.0.function.arguments",
            "must be a JSON object",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f"}]}],
            "messages.0.tool_calls.0",
            "needs a function with a name",
        ),
        ([{"role": "assistant", "tool_calls": 5}], "messages.0.tool_calls", "must be a list"),
    ],
)
def test_malformed_messages_are_refused_by_name(
    dump: ChatTemplate, sent: Any, param: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        seen(dump, sent)
    assert caught.value.param == param
    assert caught.value.status == 400


def test_tools_keep_the_order_of_their_keys_and_their_characters(dump: ChatTemplate) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "<é> & 'x'", "a": None}}
    text = small_tokenizer().decode(dump.prompt_ids(USER, tools=[tool], enable_thinking=False))
    assert json.dumps(tool, ensure_ascii=False) in text


@pytest.mark.parametrize("tool", [1, {}, {"function": {}}, {"function": {"name": 3}}])
def test_malformed_tools_are_refused(dump: ChatTemplate, tool: Any) -> None:
    with pytest.raises(RequestError, match="a tool must be") as caught:
        dump.prompt_ids(USER, tools=[tool])
    assert caught.value.param == "tools.0"


def test_deep_data_is_refused(dump: ChatTemplate) -> None:
    deep: Any = "x"
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(RequestError, match=f"deeper than {MAX_DEPTH}"):
        dump.prompt_ids(USER, tools=[{"function": {"name": "f", "x": deep}}])


def test_options_are_coerced_or_refused(dump: ChatTemplate) -> None:
    assert seen(dump, USER, enable_thinking="false")[2] is False
    assert seen(dump, USER, enable_thinking="True", reasoning_effort="low")[2] is True


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable_thinking", "maybe"),
        ("enable_thinking", 1),
        ("reasoning_effort", "huge"),
        ("chat_template", "{{ 1 }}"),
        ("tokenize", True),
    ],
)
def test_other_options_are_refused(dump: ChatTemplate, name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        dump.prompt_ids(USER, **{name: value})
    assert caught.value.param == f"chat_template_kwargs.{name}"


SPECIALS = [
    "<|im_end|>",
    "<|im_start|>system\n",
    "<think>",
    "</think>",
    "<|im",
    "_end|>",
    "<",
    "|>",
]
PIECES = st.lists(
    st.one_of(
        st.sampled_from(SPECIALS), st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    ),
    max_size=6,
).map("".join)


@settings(max_examples=60)
@given(user=PIECES, system=PIECES)
def test_what_a_client_writes_never_becomes_a_special_token(
    chatml: ChatTemplate, user: str, system: str
) -> None:
    plain = small_tokenizer().encode
    ids = chatml.prompt_ids(
        [{"role": "system", "content": system}, {"role": "user", "content": user}]
    )
    assert ids == [
        *(IM_START, *plain(f"system\n{system}"), IM_END, *plain("\n")),
        *(IM_START, *plain(f"user\n{user}"), IM_END, *plain("\n")),
        *(IM_START, *plain("assistant\n")),
    ]


def test_private_use_characters_of_the_client_survive(chatml: ChatTemplate) -> None:
    text = "<|im_end|>" + "".join(map(chr, range(0xF0000, 0xF0010)))
    ids = chatml.prompt_ids([{"role": "user", "content": text}])
    assert ids[: ids.index(IM_END)] == [IM_START, *small_tokenizer().encode(f"user\n{text}")]
    everything = "".join(map(chr, range(0xF0000, 0xFFFFE)))
    with pytest.raises(RequestError, match="every character of a private-use plane"):
        chatml.prompt_ids([{"role": "user", "content": everything}])


def test_an_error_message_shows_no_shield() -> None:
    template = template_of("{{ raise_exception('no ' + messages[0].content) }}")
    with pytest.raises(RequestError, match=r"refuses these messages: no <b>$"):
        template.prompt_ids([{"role": "user", "content": "<b>"}])
    template.close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "the template is broken: line 1"),
        ("{{ x | nosuchfilter }}", "the template is broken: line 1: No filter named"),
        ("x" * ((1 << 20) + 1), "1,048,577 characters, at most"),
    ],
)
def test_a_broken_template_is_a_broken_file(source: str, message: str) -> None:
    with pytest.raises(GGUFError, match=message):
        template_of(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages.nothing.at.all }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% for i in range(9999) %}{{ 'long text ' * 10 }}{% endfor %}", "more than the context"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "did not finish within 0.3 s of CPU time",
        ),
        ("{{ n ** (n ** n) }}", "did not finish within 0.3 s of CPU time"),
    ],
)
def test_a_hostile_template_ends_in_a_refusal(source: str, message: str) -> None:
    renderer = TemplateRenderer(
        "{% if hostile %}" + source + "{% endif %}fine", RenderLimits(max_bytes=65536, cpu_s=0.3)
    )
    started = time.monotonic()
    with pytest.raises(RequestError, match=message):
        renderer.render({"hostile": True, "messages": USER, "n": 10})
    assert time.monotonic() - started < 10
    assert renderer.render({"hostile": False}) == "fine"
    renderer.close()


def test_a_template_that_takes_for_ever_to_compile_is_refused() -> None:
    with pytest.raises(TemplateError, match=r"does not compile within 0\.3 s"):
        TemplateRenderer("{{ 10 ** (10 ** 10) }}", RenderLimits(max_bytes=9, cpu_s=0.3))


def test_a_template_that_hangs_without_using_the_cpu_is_killed() -> None:
    renderer = TemplateRenderer("x", RenderLimits(max_bytes=9, wall_s=0.3))
    child = renderer._child
    assert child is not None
    subprocess.run(["kill", "-STOP", str(child.pid)], check=True)
    started = time.monotonic()
    with pytest.raises(RequestError, match="did not finish"):
        renderer.render({})
    assert time.monotonic() - started < 10
    assert child.returncode == -9
    renderer.close()


def test_the_child_ends_with_its_owner() -> None:
    renderer = TemplateRenderer("x", RenderLimits(max_bytes=9))
    child = renderer._child
    assert child is not None
    del renderer
    gc.collect()
    assert child.returncode == -9
    assert not Path(f"/proc/{child.pid}").exists()
