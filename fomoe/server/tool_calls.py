"""Reads the tool calls in an answer, in the two forms that Qwen models write them.

<tool_call>                              <tool_call>
<function=NAME>                          {"name": NAME, "arguments": {K: V}}
<parameter=K>                            </tool_call>
V
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from fomoe.server.text import Finder

BEGIN = "<tool_call>"
END = "</tool_call>"

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


class ToolCallParser:
    """Takes tool calls out of the text of one answer as it arrives.

    What looks like a call but cannot be read stays in the text, so nothing is lost.

    Attributes:
        n_calls: Number of calls found.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self.n_calls = 0
        self._types = {tool["function"]["name"]: _types(tool["function"]) for tool in tools}
        self._finder = Finder([BEGIN])
        self._inside: str | None = None
        self._blank = False

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Return (text for people, OpenAI's `tool_calls` with their index) that are settled."""
        shown = ""
        calls: list[dict[str, Any]] = []
        while True:
            before = self._finder.push(text)
            found, text = bool(self._finder.match), self._finder.rest
            if self._inside is not None:
                self._inside += before
            else:
                shown += self._between(before)
            if not found:
                return shown, calls
            if self._inside is None:
                self._inside, self._finder = "", Finder([END])
                continue
            call = self._call(self._inside)
            if call is None:
                shown += BEGIN + self._inside + END
            else:
                calls.append(call)
                self._blank = True
            self._inside, self._finder = None, Finder([BEGIN])

    def finish(self) -> str:
        """Return what is held back; a call that was cut short is text."""
        rest = self._finder.finish()
        return rest if self._inside is None else BEGIN + self._inside + rest

    def _between(self, text: str) -> str:
        """Return text outside calls without the blank lines that part it from a call before."""
        if self._blank:
            text = text.lstrip()
            self._blank = not text
        return text

    def _call(self, raw: str) -> dict[str, Any] | None:
        parsed = self._from_tags(raw) or _from_json(raw)
        if parsed is None:
            return None
        name, arguments = parsed
        index, self.n_calls = self.n_calls, self.n_calls + 1
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        identity = f"call_{uuid.uuid4().hex[:24]}"
        return {"index": index, "id": identity, "type": "function", "function": function}

    def _from_tags(self, raw: str) -> tuple[str, dict[str, Any]] | None:
        match = _FUNCTION.fullmatch(raw)
        if match is None:
            return None
        types = self._types.get(match[1], {})
        pairs = ((one[1], one[2]) for one in _PARAMETER.finditer(match[2]))
        return match[1], {key: _typed(value, types.get(key, "string")) for key, value in pairs}


def _from_json(raw: str) -> tuple[str, dict[str, Any]] | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    return (value["name"], arguments) if isinstance(arguments, dict) else None


def _types(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON type that a tool declares for each parameter."""
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    if not isinstance(properties, Mapping):
        return {}
    return {
        name: schema.get("type", "string") if isinstance(schema, Mapping) else "string"
        for name, schema in properties.items()
    }


def _typed(value: str, kind: Any) -> Any:
    """Return a parameter's value; the model writes all of them as plain text."""
    if kind == "string":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(value, value)
