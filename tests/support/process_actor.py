"""Actors in processes of their own, without Ray: so that one can be killed for real."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["fomoe.actors.driver", "fomoe.actors.gpu", "fomoe.actors.storage"])


def serve(role: str, name: str, connection: Connection) -> None:
    """Run an actor's methods as they are asked for; the body of its process."""
    from fomoe.actors.driver import DriverActor
    from fomoe.actors.gpu import GPUActor
    from fomoe.actors.storage import StorageActor

    actor = {"driver": DriverActor, "gpu": GPUActor, "storage": StorageActor}[role](name)
    while True:
        try:
            method, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((getattr(actor, method)(*args), None))
        except Exception as error:
            connection.send((None, error))


class ProcessHandle:
    """The launcher's end of an actor process; see `launch.Handle`."""

    def __init__(self, role: str, name: str) -> None:
        self._ours, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=serve, args=(role, name, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._calls = ThreadPoolExecutor(max_workers=1)

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Start a method of the actor."""
        return self._calls.submit(self._ask, method, args)

    def _ask(self, method: str, args: tuple[Any, ...]) -> Any:
        self._ours.send((method, args))
        value, error = self._ours.recv()
        if error is not None:
            raise error
        return value

    def kill(self) -> None:
        """End the process as the kernel does when memory runs out."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(5)
        self._calls.shutdown(wait=True)
        self._ours.close()
