"""Brings the messages that clients send into the form that chat templates expect.

Templates raise on ordinary habits of clients: a `developer` role, system messages in the middle,
tool arguments as a JSON string, content as a list of parts. All of that is settled here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fomoe.errors import RequestError

MAX_MESSAGES = 16384
MAX_TOOLS = 1024
MAX_DEPTH = 64
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
FLAGS = ("enable_thinking", "preserve_thinking")

Message = dict[str, Any]


def normalise_messages(messages: Sequence[Any], *, split_thinking: bool) -> list[Message]:
    """Return clean messages: text content, known roles, one system message, which comes first.

    Args:
        messages: What the client sent.
        split_thinking: Move `<think>...</think>` in an assistant's content to
            `reasoning_content`.

    Raises:
        RequestError: a message has the wrong form; `param` names it.
    """
    if not messages:
        raise RequestError("messages is empty; send at least one message", "messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"{len(messages):,} messages, at most {MAX_MESSAGES:,}", "messages")
    clean = [_message(one, f"messages.{i}", split_thinking) for i, one in enumerate(messages)]
    system = [one["content"] for one in clean if one["role"] == "system"]
    rest = [one for one in clean if one["role"] != "system"]
    if not rest:
        raise RequestError("there are only system messages; add a user message", "messages")
    if not system:
        return rest
    return [{"role": "system", "content": "\n\n".join(filter(None, system))}, *rest]


def normalise_tools(tools: Sequence[Any] | None) -> list[dict[str, Any]] | None:
    """Return the tools with only what templates show, None when there are none.

    Raises:
        RequestError: a tool is not of the form `{type: function, function: {name, ...}}`.
    """
    if not tools:
        return None
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"{len(tools):,} tools, at most {MAX_TOOLS:,}", "tools")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(
                'a tool must be {"type": "function", "function": {"name": ..., ...}}',
                f"tools.{index}",
            )
    return [dict(tool) for tool in tools]


def normalise_options(
    options: Mapping[str, Any], *, prefix: str = "chat_template_kwargs."
) -> dict[str, Any]:
    """Return the template's options; flags may come as booleans or as "true" and "false".

    Args:
        options: What the client sent.
        prefix: Where the client sent it, for messages.

    Raises:
        RequestError: an option is not on the list or has a wrong value.
    """
    clean: dict[str, Any] = {}
    for name, value in options.items():
        param = f"{prefix}{name}"[:100]
        if name in FLAGS:
            clean[name] = _flag(name, value, param)
        elif name == "reasoning_effort":
            if value not in EFFORTS:
                raise RequestError(f"{name} must be one of {', '.join(EFFORTS)}", param)
            clean[name] = value
        else:
            allowed = ", ".join((*FLAGS, "reasoning_effort"))
            raise RequestError(f"unknown template option {name[:60]!r}; known: {allowed}", param)
    return clean


def map_strings(value: Any, change: Callable[[str], str], depth: int = 0) -> Any:
    """Return JSON data with `change` applied to every string, keys included.

    Raises:
        RequestError: the data is nested deeper than MAX_DEPTH.
    """
    if isinstance(value, str):
        return change(value)
    if depth > MAX_DEPTH:
        raise RequestError(f"the data is nested deeper than {MAX_DEPTH} levels", "messages")
    if isinstance(value, Mapping):
        return {change(str(k)): map_strings(v, change, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_strings(item, change, depth + 1) for item in value]
    return value


def _flag(name: str, value: Any, param: str) -> bool:
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower())
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false", param)
    return value


def _message(message: Any, param: str, split_thinking: bool) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError("a message must be an object with role and content", param)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"role must be one of {', '.join(ROLES)}", f"{param}.role")
    clean: Message = {
        "role": ROLES[role],
        "content": _text(message.get("content"), role, f"{param}.content"),
    }
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str):
            clean[name] = message[name]
    if role == "assistant":
        _add_reasoning(clean, message, split_thinking)
        if message.get("tool_calls"):
            clean["tool_calls"] = _tool_calls(message["tool_calls"], f"{param}.tool_calls")
    return clean


def _text(content: Any, role: str, param: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, (list, tuple)):
        raise RequestError("content must be a string or a list of text parts", param)
    texts: list[str] = []
    for index, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise RequestError(
                f"only text parts can be read, this one is of type {str(kind)[:40]!r}; images, "
                "audio and files are not supported",
                f"{param}.{index}",
            )
        texts.append(text)
    return "".join(texts)


def _add_reasoning(clean: Message, message: Mapping[str, Any], split_thinking: bool) -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(message.get(name), str):
            clean["reasoning_content"] = message[name]
            return
    content: str = clean["content"]
    if split_thinking and "</think>" in content:
        # The template cannot do this itself: shielded text has no tags that it would recognise.
        before = content.partition("</think>")[0].rstrip("\n")
        clean["reasoning_content"] = before.rpartition("<think>")[2].lstrip("\n")
        clean["content"] = content.rpartition("</think>")[2].lstrip("\n")


def _tool_calls(calls: Any, param: str) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)):
        raise RequestError("tool_calls must be a list", param)
    clean: list[dict[str, Any]] = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError("a tool call needs a function with a name", f"{param}.{index}")
        arguments = _arguments(function.get("arguments"), f"{param}.{index}.function.arguments")
        entry: dict[str, Any] = {
            "type": "function",
            "function": {"name": function["name"], "arguments": arguments},
        }
        if isinstance(call.get("id"), str):
            entry["id"] = call["id"]
        clean.append(entry)
    return clean


def _arguments(arguments: Any, param: str) -> dict[str, Any]:
    """Return a call's arguments as an object; clients send them as JSON in a string."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise RequestError(f"arguments is not valid JSON: {error}", param) from None
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise RequestError("arguments must be a JSON object", param)
    return dict(arguments)
