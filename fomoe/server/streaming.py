"""Responses that stop their work as soon as the client has gone."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from fomoe.errors import FomoeError
from fomoe.server.errors import api_error, error_response, stopping_error, to_json
from fomoe.server.tasks import end_tasks, in_this_task

Frames = AsyncGenerator[bytes, None]

DONE = b"data: [DONE]\n\n"
LAST_S = 1.0  # for what a stopping server still says to a client

log = logging.getLogger(__name__)

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def frame(value: Any) -> bytes:
    """Return a server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def comment(text: str) -> bytes:
    """Return a comment, which clients skip: a sign of life."""
    return b": " + text.encode() + b"\n\n"


class Watched(Response, ABC):
    """Base of the responses here: runs `work`, and cancels it when the client disconnects.

    A server that stops cancels the request itself; its client is told so.
    """

    def __init__(self) -> None:
        super().__init__()
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""

        async def noted(message: Message) -> None:
            await send(message)
            self._begun = True

        work = asyncio.create_task(self.work(scope, receive, noted))
        gone = asyncio.create_task(_disconnected(receive))
        stopping = False
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            stopping = True
        while not (work.done() and gone.done()):
            # The event loop cancels once more before it closes.
            with suppress(asyncio.CancelledError):
                await end_tasks((work, gone))
        if not work.cancelled():
            work.result()
        elif stopping:
            await in_this_task(self._give_up(scope, receive, send), LAST_S)

    async def _give_up(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._begun:
            await self.cut(send)
        else:
            await error_response(stopping_error())(scope, receive, send)

    async def cut(self, send: Send) -> None:
        """End an answer that has begun; one of known length can only be left as it is."""

    @abstractmethod
    async def work(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do the work and send the answer."""


class JsonAnswer(Watched):
    """One JSON body that takes a while to make."""

    def __init__(self, make: Callable[[], Awaitable[Any]]) -> None:
        super().__init__()
        self._make = make

    async def work(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make the body and send it; an exception becomes an error response."""
        try:
            body = to_json(await self._make())
        except Exception as error:
            await error_response(api_error(error))(scope, receive, send)
            return
        await Response(body, media_type="application/json")(scope, receive, send)


class EventStream(Watched):
    """Server-sent events.

    An exception before the first frame becomes an error response; a later one a last frame with
    the error, and no `[DONE]`. A client that does not read for `stall_s` seconds is given up, so
    that what is buffered for it stays bounded.
    """

    def __init__(self, frames: Frames, *, stall_s: float) -> None:
        super().__init__()
        self._frames = frames
        self._stall_s = stall_s

    async def work(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send frames as they come."""
        async with aclosing(self._frames) as frames:
            try:
                first = await anext(frames)
            except Exception as error:
                await error_response(api_error(error))(scope, receive, send)
                return
            try:
                await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                await self._send(send, first)
                await self._send_rest(send, frames)
            except StalledError as error:
                log.warning("a stream was given up: %s", error)

    async def _send_rest(self, send: Send, frames: Frames) -> None:
        try:
            async for one in frames:
                await self._send(send, one)
        except StalledError:
            raise
        except Exception as error:
            await self._send(send, frame(api_error(error).body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def cut(self, send: Send) -> None:
        """Say in a last frame that the server stops."""
        last = frame(stopping_error().body)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        sending = asyncio.create_task(_sent(send, data))
        try:
            done, _ = await asyncio.wait({sending}, timeout=self._stall_s)
        finally:
            sending.cancel()
        if not done:
            raise StalledError(f"the client read nothing for {self._stall_s:g} s")
        sending.result()


class StalledError(FomoeError):
    """The client does not read what it asked for."""


async def _sent(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
