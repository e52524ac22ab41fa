"""What every actor process does alike: its loop thread, its fabric, its place in the system."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from fomoe.actors.channel import (
    Endpoint,
    Fabric,
    FabricSpec,
    Listener,
    Transport,
    connect,
    open_fabric,
)
from fomoe.errors import ChannelError, FomoeError

log = logging.getLogger("fomoe")

_STATUS_PERIOD_S = 10.0
_IDLE_WAIT_MS = 100


def prepare_process() -> None:
    """Undo what Ray's defaults do to a data-plane process.

    Ray starts workers at nice 15, where they lose every contended core; a busy Python thread holds
    the interpreter for 5 ms at a time.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) > 0:
        # Only root may lower it; the launcher tells the user what to set otherwise.
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)
    sys.setswitchinterval(1e-4)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


class FabricMember:
    """A process's place in the fabric; the control plane calls these in every actor.

    First `join`, the creator of a box's fabric before its neighbours; then `connect` in all
    processes at the same time.
    """

    # Whether the process ends itself when a peer dies: Ray may leave an orphan alive for a minute.
    exits_when_orphaned = False

    def __init__(self, name: str) -> None:
        prepare_process()
        self.name = name
        self._fabric: Fabric | None = None
        self._listener: Listener | None = None
        self._transport: Transport = "auto"

    @property
    def fabric(self) -> Fabric:
        """The fabric, once joined."""
        assert self._fabric is not None, f"{self.name} has joined no fabric"
        return self._fabric

    def join(self, spec: dict[str, Any], box_id: str, offers: list[dict[str, Any]],
             host: str, transport: Transport) -> dict[str, Any]:  # fmt: skip
        """Create or attach to the box's fabric; returns this process's endpoint."""
        self._transport = transport
        self._fabric = open_fabric(
            FabricSpec.from_dict(spec), self.name, box_id,
            [Endpoint.from_dict(offer) for offer in offers], transport,
        )  # fmt: skip
        self._listener = Listener(host)
        return self._listener.endpoint(self._fabric, box_id).to_dict()

    def connect(self, endpoints: list[dict[str, Any]]) -> dict[str, str]:
        """Reach every neighbour; returns over what each is reached (`shm` or `tcp`)."""
        assert self._listener is not None
        peers = [Endpoint.from_dict(endpoint) for endpoint in endpoints]
        return dict(connect(self.fabric, self._listener, peers, self._transport))

    def pid(self) -> int:
        """Return the process id."""
        return os.getpid()

    def nice(self) -> int:
        """Return the process's nice value, which Ray sets to 15 unless told otherwise."""
        return os.getpriority(os.PRIO_PROCESS, 0)

    def leave(self) -> None:
        """Leave the fabric; peers see this process as gone."""
        if self._listener is not None:  # still open where `connect` never came
            self._listener.close()
        if self._fabric is not None:
            self._fabric.close()


class LoopThread:
    """Runs `poll` in a daemon thread until stopped or until it raises.

    `poll` does what there is to do and returns whether it did anything; when not, the thread
    sleeps on the fabric's bell for at most 100 ms, so stop flags and dead peers are always seen.
    After work it looks for more for `spin_us` first, yielding its core: to wake a sleeper takes
    ten times as long as a layer's messages. The first exception ends the loop and is kept in
    `error`.
    """

    def __init__(
        self,
        member: FabricMember,
        poll: Callable[[], bool],
        status: Callable[[], str],
        spin_us: float = 0.0,
    ) -> None:
        self._fabric = member.fabric
        self._exits = member.exits_when_orphaned
        self._poll = poll
        self._status = status
        self._spin_us = spin_us
        self._name = name = member.name
        self._stopping = threading.Event()
        self._report_at = math.inf
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin; garbage that exists now is never looked at again."""
        gc.collect()
        gc.freeze()
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Ask the loop to end; returns whether it did within the bound."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive()

    def report(self) -> None:
        """Log the status if it is due; `poll` calls this where it takes long."""
        if time.monotonic() >= self._report_at:
            self._report_at = time.monotonic() + _STATUS_PERIOD_S
            log.info("%s: %s", self._name, self._status())

    def _run(self) -> None:
        self._report_at = time.monotonic() + _STATUS_PERIOD_S
        spin_us = 0.0
        try:
            while not self._stopping.is_set():
                bell = self._fabric.bell()
                if self._poll():
                    spin_us = self._spin_us
                else:
                    rung = self._fabric.wait(bell, spin_us, _IDLE_WAIT_MS)
                    spin_us = self._spin_us if rung else 0.0
                self.report()
        except BaseException as error:
            self.error = error
            log.error("%s: loop ended: %s", self._name, error, exc_info=_is_surprise(error))
            self._fabric.close()  # peers take it as a death and do not wait for answers
            if self._exits and isinstance(error, ChannelError):
                os._exit(1)


def _is_surprise(error: BaseException) -> bool:
    return not isinstance(error, FomoeError)
