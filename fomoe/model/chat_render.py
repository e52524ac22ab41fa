"""Renders a chat template in a child process with bounds on time, memory and output."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from typing import Any

from fomoe.errors import RequestError
from fomoe.model.chat_worker import HEAD

# A busy machine takes its time to start a process.
START_S = 60.0

# The child gets this interpreter's module path, whatever environment it is started in.
_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from fomoe.model.chat_worker import main; main()"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    """What one rendering may cost.

    Attributes:
        max_bytes: Bytes of the rendered text.
        cpu_s: CPU seconds of the child.
        wall_s: Seconds after which the child is killed, however busy the machine is.
        memory_bytes: Address space of the child.
    """

    max_bytes: int
    cpu_s: float = 2.0
    wall_s: float = 20.0
    memory_bytes: int = 512 << 20


class TemplateError(Exception):
    """The template itself is broken; the message says where."""


class TemplateRenderer:
    """One template and the child process that renders it; calls from several threads take turns.

    Raises:
        TemplateError: the template does not compile.
    """

    def __init__(self, source: str, limits: RenderLimits) -> None:
        self._source = source
        self._limits = limits
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._cleanup: weakref.finalize[Any, Any] | None = None
        with self._lock:
            self._start()

    def render(self, variables: dict[str, Any]) -> str:
        """Return the rendered text.

        Raises:
            RequestError: the template refuses the variables, fails on them, or exceeds a limit.
        """
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._start()
            try:
                reply = self._exchange(variables, self._limits.wall_s)
            except (TimeoutError, EOFError, BrokenPipeError):
                self._stop()
                raise RequestError(
                    "the chat template did not finish within "
                    f"{self._limits.cpu_s:g} s of CPU time and "
                    f"{self._limits.memory_bytes >> 20} MiB; send shorter messages, or use another "
                    "model file when this happens with short ones",
                    "messages",
                ) from None
        if "text" in reply:
            return str(reply["text"])
        raise RequestError(self._explain(reply), "messages")

    def close(self) -> None:
        """End the child process."""
        with self._lock:
            self._stop()

    def _explain(self, reply: dict[str, Any]) -> str:
        if reply["kind"] == "long":
            return (
                f"the prompt is longer than {self._limits.max_bytes:,} bytes, more than the "
                "context can hold; send shorter messages"
            )
        if reply["kind"] == "refused":
            return f"the model's chat template refuses these messages: {reply['error']}"
        return f"the model's chat template fails on these messages: {reply['error']}"

    def _start(self) -> None:
        self._stop()
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOT, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._child = child
        self._cleanup = weakref.finalize(self, _end, child)
        limits = self._limits
        first = {
            "source": self._source,
            "max_bytes": limits.max_bytes,
            "cpu_s": limits.cpu_s,
            "memory_bytes": limits.memory_bytes,
        }
        try:
            reply = self._exchange(first, START_S)
        except (TimeoutError, EOFError, BrokenPipeError):
            self._stop()
            raise TemplateError(f"it does not compile within {limits.cpu_s:g} s") from None
        if "text" not in reply:
            self._stop()
            raise TemplateError(reply["error"])

    def _stop(self) -> None:
        if self._cleanup is not None:
            self._cleanup()
        self._child = self._cleanup = None

    def _exchange(self, value: dict[str, Any], wall_s: float) -> dict[str, Any]:
        """Send a frame and wait for its answer."""
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        data = json.dumps(value).encode()
        child.stdin.write(HEAD.pack(len(data)) + data)
        child.stdin.flush()
        deadline = time.monotonic() + wall_s
        size = HEAD.unpack(_read(child.stdout.fileno(), HEAD.size, deadline))[0]
        reply: dict[str, Any] = json.loads(_read(child.stdout.fileno(), size, deadline))
        return reply


def _read(fd: int, size: int, deadline: float) -> bytes:
    """Read exactly `size` bytes from a pipe, until `deadline` on the monotonic clock."""
    data = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while len(data) < size:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            part = os.read(fd, size - len(data))
            if not part:
                raise EOFError
            data += part
    return bytes(data)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill and reap a child and close its pipes."""
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # bytes that the dead child never read
