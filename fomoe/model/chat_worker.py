"""The child process that renders a chat template, so that a bad one cannot hurt the server.

Templates come with model files from strangers. jinja2's sandbox keeps them from Python's insides,
but not from endless loops or huge strings; here the kernel bounds CPU time and memory, and a
template that exceeds them takes only this process with it.

Frames on stdin and stdout are a 4-byte little-endian length and that many bytes of JSON. The first
frame in is `{source, max_bytes, cpu_s, memory_bytes}`, each later one the template's variables;
each is answered by `{text}` or `{error, kind}`.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
import time
from typing import Any, BinaryIO

from jinja2 import Template
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

HEAD = struct.Struct("<I")


class TooLongError(Exception):
    """The rendered text exceeds its bound."""


def main() -> None:
    """Serve frames until stdin ends."""
    first = read_frame(sys.stdin.buffer)
    if first is None:
        return
    resource.setrlimit(resource.RLIMIT_AS, (first["memory_bytes"], first["memory_bytes"]))
    signal.setitimer(signal.ITIMER_PROF, first["cpu_s"])
    try:
        template = environment().from_string(first["source"])
    except Exception as error:
        write_frame(sys.stdout.buffer, failure(error))
        return
    signal.setitimer(signal.ITIMER_PROF, 0)
    write_frame(sys.stdout.buffer, {"text": ""})
    while (variables := read_frame(sys.stdin.buffer)) is not None:
        # Nobody handles SIGPROF, so the kernel ends the process when its CPU time is up.
        signal.setitimer(signal.ITIMER_PROF, first["cpu_s"])
        reply = answer(template, variables, first["max_bytes"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_frame(sys.stdout.buffer, reply)


def environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that chat templates are written for (that of transformers)."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = time.strftime
    return env


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as models saw it in training: keys in order, nothing escaped for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def raise_exception(message: str) -> None:
    """Refuse the messages; templates call this."""
    raise TemplateError(message)


def answer(template: Template, variables: dict[str, Any], max_bytes: int) -> dict[str, Any]:
    """Render one frame's variables into the frame to send back."""
    try:
        return {"text": render(template, variables, max_bytes)}
    except Exception as error:
        return failure(error)


def render(template: Template, variables: dict[str, Any], max_bytes: int) -> str:
    """Return the rendered text.

    Raises:
        TooLongError: the text has more than `max_bytes` bytes.
    """
    parts: list[str] = []
    size = 0
    for part in template.generate(variables):
        size += len(part.encode("utf-8", "surrogatepass"))
        if size > max_bytes:
            raise TooLongError
        parts.append(part)
    return "".join(parts)


def failure(error: Exception) -> dict[str, Any]:
    """Describe an exception: `kind` is refused, long or broken."""
    if isinstance(error, TooLongError):
        return {"kind": "long", "error": ""}
    if isinstance(error, TemplateSyntaxError):
        return {"kind": "broken", "error": f"line {error.lineno}: {error.message}"[:500]}
    if type(error) is TemplateError:
        return {"kind": "refused", "error": str(error)[:500]}
    return {"kind": "broken", "error": f"{type(error).__name__}: {error}"[:500]}


def read_frame(stream: BinaryIO) -> Any:
    """Return the next frame's value, None at the end of the stream."""
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    return json.loads(stream.read(HEAD.unpack(head)[0]))


def write_frame(stream: BinaryIO, value: Any) -> None:
    """Send one frame."""
    data = json.dumps(value).encode()
    stream.write(HEAD.pack(len(data)) + data)
    stream.flush()
