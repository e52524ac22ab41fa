"""An engine as a child process that answers JSON lines; every wait has a bound."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from versus.cgroup import MemoryLimit

HERE = Path(__file__).parent
ANSWER_S = 900.0
EXIT_S = 60.0


class EngineError(Exception):
    """The engine refused, died or did not answer in time."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start an engine's runner, and in which memory limit."""

    command: tuple[str, ...]
    limit: MemoryLimit | None = None


def llama_launch(
    venv: Path, environment: tuple[str, ...], limit: MemoryLimit | None = None
) -> Launch:
    """Return how to start llama.cpp with NAME=value pairs added to its environment."""
    python, script = str(venv / "bin" / "python"), str(HERE / "llama_runner.py")
    return Launch(("env", *environment, python, script), limit)


def fomoe_launch(limit: MemoryLimit | None = None) -> Launch:
    """Return how to start fomoe; Ray's own guard would end workers below the group's limit."""
    script = str(HERE / "fomoe_runner.py")
    return Launch(("env", "RAY_memory_monitor_refresh_ms=0", sys.executable, script), limit)


class Engine:
    """A running child; `with` ends it and whatever it started."""

    def __init__(self, launch: Launch) -> None:
        command = list(launch.command)
        if launch.limit is not None:
            command = launch.limit.enter(command)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 lives as long as the engine
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, start_new_session=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """The root of the engine's process tree."""
        return self._process.pid

    def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return its answer; EngineError where there is none."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"op": op} | arguments) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise EngineError(f"died before {op}: {self._last_words()}") from None
        ready, _, _ = select.select([process.stdout], [], [], ANSWER_S)
        if not ready:
            raise EngineError(f"no answer to {op} within {ANSWER_S:.0f} s")
        line = process.stdout.readline()
        if not line:
            raise EngineError(f"died during {op}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(5.0)
            if code == -signal.SIGKILL:
                return "killed, most likely out of memory"
        self._errors.seek(0)
        return self._errors.read()[-500:].strip() or f"exit status {self._process.poll()}"

    def close(self) -> None:
        """Ask the engine to end, then end its process group."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(EXIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(EXIT_S)
        process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
