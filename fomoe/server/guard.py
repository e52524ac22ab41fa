"""Decides at the door whether a request is let in: host, key, size, and room for it."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fomoe.config import is_loopback
from fomoe.server.errors import ApiError, error_response, stopping_error
from fomoe.server.services import Services

OPEN_PATH = "/health"
GENERATION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
GONE = 499  # nginx's code for a client that left before its answer


class Guard:
    """ASGI middleware around all routes; refusing is cheap, the body has not been read by then."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services
        self._pending = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in or refuse it (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"] if name != b"host"}
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        counted = scope["method"] == "POST" and scope["path"] in GENERATION_PATHS
        code = GONE

        async def watched(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        self._pending += counted
        try:
            self._check_host(hosts)
            self._check_key(scope["path"], headers)
            self._check_size(headers)
            if scope["method"] == "POST":
                _check_type(headers)
            if counted:
                self._check_room()
            await self._app(scope, self._bounded(receive), watched)
        except ApiError as refusal:
            await error_response(refusal)(scope, receive, watched)
        except asyncio.CancelledError:
            # The server stops, and the request is so young that nothing has been answered.
            if code != GONE:
                raise
            await error_response(stopping_error())(scope, receive, watched)
        finally:
            self._pending -= counted
            self._services.metrics.responded(_endpoint(scope), code)

    def _check_host(self, hosts: Iterable[bytes]) -> None:
        """Refuse foreign names, through which a web page could reach a server on loopback."""
        allowed = self._services.info.allowed_hosts
        if allowed is None:
            return
        names = [host_name(value.decode("latin-1")) for value in hosts]
        if len(names) != 1 or not (is_loopback(names[0]) or names[0] in map(str.lower, allowed)):
            shown = ", ".join(names)[:100] or "(none)"
            raise ApiError(
                403,
                f"the Host header {shown!r} is not a name of this server; use http://127.0.0.1 or "
                "http://localhost",
            )

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        key = self._services.info.api_key
        if key is None or path == OPEN_PATH:
            return
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        sent = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if not hmac.compare_digest(sent, key.encode()):
            raise ApiError(
                401,
                "this server needs an API key; send it as Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_size(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18:
            raise ApiError(400, "the Content-Length header is not a number")
        if int(length) > self._services.info.max_body_bytes:
            raise ApiError(413, self._too_long())

    def _check_room(self) -> None:
        """Refuse work that cannot be begun or queued."""
        info = self._services.info
        status = self._services.engine.status()
        wait = {"Retry-After": str(info.retry_after_s)}
        if status.state == "loading":
            message = f"Loading model: {status.load_progress:.0%}"
            raise ApiError(503, message, headers=wait)
        if status.state == "degraded":
            raise ApiError(503, f"{status.detail}; try again later", headers=wait)
        if status.state == "stopped":
            raise ApiError(503, "the engine has stopped; restart the server", headers=wait)
        if self._pending > info.max_pending:
            raise ApiError(
                429,
                f"{info.max_pending} requests are under way or waiting; try again later",
                headers=wait,
            )

    def _bounded(self, receive: Receive) -> Receive:
        """Return `receive` with a limit on the body's bytes, whatever its headers claim."""
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._services.info.max_body_bytes:
                raise HTTPException(413, self._too_long())
            return message

        return bounded

    def _too_long(self) -> str:
        return f"the body is longer than {self._services.info.max_body_bytes:,} bytes"


def _check_type(headers: dict[bytes, bytes]) -> None:
    """Refuse what a web page can send to any address without asking its browser's permission."""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json" and not kind.endswith(b"+json"):
        raise ApiError(400, "send JSON with the header Content-Type: application/json")


def host_name(header: str) -> str:
    """Return the name in a Host header, lower case, without port, brackets and last dot."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower().rstrip(".")


def _endpoint(scope: Scope) -> str:
    """Return the route that answered, so that clients cannot make up labels."""
    return str(getattr(scope.get("route"), "path", "other"))
