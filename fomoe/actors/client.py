"""The engine as the server and the command line see it: a ring of events as async streams."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator

import numpy as np

from fomoe.actors.messages import (
    Cancel,
    LogitsRequest,
    LogitsRows,
    Message,
    StatusRequest,
    encode,
)
from fomoe.actors.names import DRIVER
from fomoe.actors.process import FabricMember, log
from fomoe.actors.wire import MessagePort
from fomoe.engine.requests import EngineStatus, Event, Finished, GenerateRequest
from fomoe.errors import EngineError, FomoeError, RequestError
from fomoe.model.buffers import F32

_STATUS_PERIOD_S = 1.0
_WAIT_MS = 100.0
_FULL_WAIT_MS = 5.0  # the driver's ring is full; nobody rings when there is room again
_POLL_US = 50.0

Answer = Event | LogitsRows


class Inbox:
    """Events of one request, filled by the pump thread and read by an event loop or a thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._items: deque[Answer] = deque()
        self._loop = loop
        self._changed = threading.Condition() if loop is None else None
        self._event = asyncio.Event() if loop is not None else None

    def put(self, item: Answer) -> None:
        """Add an event from the pump thread."""
        self._items.append(item)
        if self._changed is not None:
            with self._changed:
                self._changed.notify()
        elif self._loop is not None and self._event is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed with the request open
                self._loop.call_soon_threadsafe(self._event.set)

    async def get(self) -> Answer:
        """Return the next event."""
        assert self._event is not None
        while not self._items:
            await self._event.wait()
            self._event.clear()
        return self._items.popleft()

    def get_blocking(self) -> Answer:
        """Return the next event; for callers without an event loop."""
        assert self._changed is not None
        with self._changed:
            while not self._items:
                self._changed.wait(1.0)
        return self._items.popleft()


class EngineClient(FabricMember):
    """Talks to the driver actor from the process that serves; implements `Engine`.

    One thread pumps both directions of the ring, so any number of requests may be open.
    """

    def __init__(self, name: str, ctx_size: int) -> None:
        super().__init__(name)
        self._ctx_size = ctx_size
        self._inboxes: dict[str, Inbox] = {}
        self._outgoing: deque[bytes] = deque()
        self._sent = 0  # bytes of the first outgoing message that have gone
        self._asked = False  # for a status that has not come yet
        self._status = EngineStatus(state="loading", load_progress=0.0)
        self._failure: str | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._pump, name="fomoe-client", daemon=True)

    @property
    def ctx_size(self) -> int:
        """Tokens that one sequence may hold (prompt and answer together)."""
        return self._ctx_size

    def start(self) -> None:
        """Begin to pump messages."""
        self._port = MessagePort(self.fabric, DRIVER)
        self._thread.start()

    def report(self, status: EngineStatus) -> None:
        """Set the status that `status` returns until the driver's own arrives (loading)."""
        if self._failure is None:
            self._status = status

    def status(self) -> EngineStatus:
        """Return the newest status without blocking."""
        return self._status

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """Yield the request's events; closing the iterator early cancels the request."""
        inbox = self._open(request, asyncio.get_running_loop())
        try:
            while True:
                event = await inbox.get()
                assert not isinstance(event, LogitsRows)
                if isinstance(event, Finished):
                    self._inboxes.pop(request.request_id, None)
                    yield event
                    return
                yield event
        finally:
            self._close(request.request_id)

    def cancel(self, request_id: str) -> None:
        """Ask the driver to end a request; its events go on to their `Finished`."""
        if request_id in self._inboxes and self._failure is None:
            self._outgoing.append(encode(Cancel(request_id=request_id)))
            self.fabric.ring(self.name)

    def stream(self, request: GenerateRequest | LogitsRequest) -> Iterator[Answer]:
        """Yield the request's events in the calling thread; closing early cancels."""
        inbox = self._open(request, None)
        try:
            while True:
                event = inbox.get_blocking()
                if isinstance(event, Finished):
                    self._inboxes.pop(request.request_id, None)
                    yield event
                    return
                yield event
        finally:
            self._close(request.request_id)

    def logits(self, tokens: list[int], vocab: int) -> F32:
        """Return the logits float32 [T, V] of a sequence; EngineError where it failed."""
        out = np.zeros((len(tokens), vocab), np.float32)
        request = LogitsRequest(request_id=f"logits-{next(_NUMBERS)}", tokens=tokens)
        for event in self.stream(request):
            if isinstance(event, LogitsRows):
                rows = np.frombuffer(event.data, "<f4").reshape(-1, vocab)
                out[event.start : event.start + len(rows)] = rows
            elif isinstance(event, Finished) and event.error is not None:
                raise EngineError(event.error)
        return out

    def quiet(self) -> None:
        """End the thread and fail what is open; the driver may go now."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(5.0)
        self._fail("the engine was stopped")

    def close(self) -> None:
        """Leave the fabric."""
        self.quiet()
        self._status = EngineStatus(state="stopped")
        self.leave()

    def _open(
        self, request: GenerateRequest | LogitsRequest, loop: asyncio.AbstractEventLoop | None
    ) -> Inbox:
        if request.request_id in self._inboxes:
            raise EngineError(f"request {request.request_id} is open already")
        data = _encoded(request)
        inbox = Inbox(loop)
        self._inboxes[request.request_id] = inbox
        if self._failure is not None:
            self._end(request.request_id, self._failure)
        else:
            self._outgoing.append(data)
            self.fabric.ring(self.name)
        return inbox

    def _close(self, request_id: str) -> None:
        """Forget a request; where it had not finished, tell the driver."""
        if self._inboxes.pop(request_id, None) is not None and self._failure is None:
            self._outgoing.append(encode(Cancel(request_id=request_id)))
            self.fabric.ring(self.name)

    def _pump(self) -> None:
        status_at = 0.0
        try:
            while not self._stopping.is_set():
                bell = self.fabric.bell()
                busy = self._send_all()
                while (message := self._port.receive()) is not None:
                    self._dispatch(message)
                    busy = True
                if not self._asked and time.monotonic() >= status_at:
                    status_at = time.monotonic() + _STATUS_PERIOD_S
                    self._asked = True
                    self._outgoing.append(encode(StatusRequest(nonce=0)))
                    busy = True
                if not busy:
                    self.fabric.wait(bell, _POLL_US, _FULL_WAIT_MS if self._outgoing else _WAIT_MS)
        except Exception as error:  # whatever it is, nobody must wait for an answer any more
            log.error("the engine is lost: %s", error, exc_info=not isinstance(error, FomoeError))
            self._fail(str(error))

    def _send_all(self) -> bool:
        """Send what there is room for: inside a long step the driver takes nothing."""
        busy = False
        while self._outgoing:
            data = self._outgoing[0]
            self._sent = self._port.try_send(data, self._sent)
            if self._sent < len(data):
                break
            self._outgoing.popleft()
            self._sent, busy = 0, True
        return busy

    def _dispatch(self, message: Message) -> None:
        if isinstance(message, EngineStatus):
            self._status, self._asked = message, False
            return
        request_id = getattr(message, "request_id", None)
        inbox = self._inboxes.get(request_id) if isinstance(request_id, str) else None
        if inbox is not None:  # else: cancelled, its last events are of no interest
            inbox.put(message)  # type: ignore[arg-type]

    def _fail(self, reason: str) -> None:
        """End every open request with an error; requests from now on end at once."""
        if self._status.state == "degraded":  # the driver told the cause before it went
            reason = self._status.detail
        self._failure = reason
        self._status = EngineStatus(state="degraded", detail=reason)
        for request_id in list(self._inboxes):
            self._end(request_id, reason)

    def _end(self, request_id: str, reason: str) -> None:
        inbox = self._inboxes.get(request_id)
        if inbox is not None:
            inbox.put(Finished(request_id=request_id, reason="error", error=reason))


def _encoded(request: GenerateRequest | LogitsRequest) -> bytes:
    """Return the wire form; RequestError where a value is not of its declared type."""
    try:
        return encode(request)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"the request cannot be sent: {error}") from error


_NUMBERS = itertools.count()
