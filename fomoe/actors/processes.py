"""Actors in child processes, without Ray: one machine, the same classes, the same fabric.

Each child is a Python of its own that imports an actor class and does what comes over a socket
pair that nobody else has. It ends when its parent does.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from fomoe.actors.launch import Box, Handle, RunningEngine, Site, launch
from fomoe.config import EngineConfig
from fomoe.errors import ConfigError, EngineError
from fomoe.gguf.reader import GGUFFile
from fomoe.model.spec import ModelSpec

CLASSES = {
    "driver": "fomoe.actors.driver:DriverActor",
    "gpu": "fomoe.actors.gpu:GPUActor",
    "layers": "fomoe.actors.layers:LayerActor",
    "storage": "fomoe.actors.storage:StorageActor",
}
_END_S = 5.0


class ProcessHandle:
    """The launcher's end of an actor in a child process; calls are answered in their order."""

    def __init__(self, kind: str, name: str) -> None:
        self.name = name
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "fomoe.actors.processes"]
            self.process = subprocess.Popen(
                [*command, kind, name, str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        self._connection = Connection(ours.detach())
        self._waiting: list[Future[Any]] = []
        self._lock = threading.Lock()
        self._ended = False
        self._reader = threading.Thread(target=self._read, name=f"fomoe-{name}", daemon=True)
        self._reader.start()

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Start a method of the actor; the future carries its result or its exception."""
        future: Future[Any] = Future()
        with self._lock:
            if self._ended:
                future.set_exception(self._gone())
                return future
            self._waiting.append(future)
            try:
                self._connection.send((method, args))
            except OSError:
                self._waiting.remove(future)
                future.set_exception(self._gone())
        return future

    def _read(self) -> None:
        """Give answers to whoever waits; when the process has ended, an error."""
        while True:
            try:
                value, error = self._connection.recv()
            except (EOFError, OSError):
                break
            with self._lock:
                future = self._waiting.pop(0)
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(_raised(*error))
        with self._lock:
            self._ended = True
            waiting, self._waiting = self._waiting, []
        for future in waiting:
            future.set_exception(self._gone())

    def _gone(self) -> EngineError:
        code = self.process.poll()
        how = "is ending" if code is None else f"has ended with code {code}"
        return EngineError(f"process {self.name} {how}; its own messages on stderr say why")

    def kill(self) -> None:
        """End the process, at once."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(_END_S)
        self._reader.join(_END_S)
        self._connection.close()


class ProcessLauncher:
    """Starts engines on this machine alone; stands where a `Cluster` stands.

    `classes` name what each role runs, as "module:class".
    """

    has_token = False

    def __init__(self, classes: dict[str, str] | None = None) -> None:
        self.classes = dict(CLASSES) if classes is None else classes

    def launch(
        self, file: GGUFFile, spec: ModelSpec, config: EngineConfig, name: str,
        on_progress: Callable[[float, str], None] | None = None,
    ) -> RunningEngine:  # fmt: skip
        """Start an engine of child processes.

        Raises:
            ConfigError: a device is on another node.
        """
        del name  # children need none that others could look up
        elsewhere = [device for device in config.devices if "@" in device]
        if elsewhere:
            raise ConfigError(
                f"device {elsewhere[0]}: processes without Ray stay on this machine; "
                "leave the @NODE out, or start with Ray"
            )

        def spawn(role: str, process: str, box: int) -> Handle:
            del box
            return ProcessHandle(self.classes[role], process)

        site = Site((Box("here", "127.0.0.1"),), (0,) * len(config.devices),
                    len(os.sched_getaffinity(0)))  # fmt: skip
        return launch(file, spec, config, site, spawn, on_progress)

    def hints(self) -> list[str]:
        """Return lines for people: there is nothing to say of a cluster."""
        return []

    def close(self) -> None:
        """Nothing outlives its engine."""


def serve(kind: str, name: str, connection: Connection) -> None:
    """Do what comes over the connection until it closes; the body of a child."""
    module, _, attribute = kind.partition(":")
    actor = getattr(importlib.import_module(module), attribute)(name)
    actor.exits_when_orphaned = True
    while True:
        try:
            method, args = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[Any, Any] = getattr(actor, method)(*args), None
        except Exception as error:
            answer = None, (type(error), error.args, vars(error))
        try:
            connection.send(answer)
        except OSError:
            return


def _raised(kind: type[Exception], args: tuple[Any, ...], values: dict[str, Any]) -> Exception:
    """Return an exception as it was raised; pickle would call its constructor with `args`."""
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(values)
    return error


def main() -> None:
    """Run an actor: arguments are its class, its name and the number of its socket."""
    kind, name, descriptor = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears of it and ends its children
    serve(kind, name, Connection(int(descriptor)))
    os._exit(0)  # threads of the actor may still run


if __name__ == "__main__":
    main()
