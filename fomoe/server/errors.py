"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fomoe.errors import FomoeError, RequestError

log = logging.getLogger(__name__)

# llama.cpp's names, which its clients know.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
MAX_MESSAGE_CHARS = 2000


class ApiError(FomoeError):
    """An answer other than success.

    Attributes:
        status: HTTP status.
        body: The response's JSON.
        headers: Headers besides the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        error = {
            "message": message[:MAX_MESSAGE_CHARS],
            "type": kind or _TYPES.get(status, "invalid_request_error"),
            "param": param,
            "code": status,
        }
        self.body = {"error": error | more}
        self.headers = dict(headers or {})


def api_error(error: Exception) -> ApiError:
    """Return the answer to an exception; the text of an unexpected one goes to the log only."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(error.status, str(error), param=error.param)
    if isinstance(error, FomoeError):
        return ApiError(500, str(error))
    log.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; the server's log says more")


def context_error(n_prompt: int, n_ctx: int) -> ApiError:
    """Return the refusal of a prompt that does not fit."""
    return ApiError(
        400,
        f"the prompt has {n_prompt:,} tokens, the context holds {n_ctx:,} including the answer; "
        "shorten it, or start the server with a larger --ctx-size",
        kind="exceed_context_size_error",
        param="prompt",
        n_prompt_tokens=n_prompt,
        n_ctx=n_ctx,
    )


def stopping_error() -> ApiError:
    """Return the answer to a request that is not done when the server ends."""
    return ApiError(503, "the server is stopping; send the request again once it is back")


def to_json(value: Any) -> bytes:
    """Return compact JSON in UTF-8; half a surrogate pair becomes its JSON escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # What Python calls backslashreplace is, for a lone surrogate, just how JSON escapes it.
    return text.encode("utf-8", "backslashreplace")


class JsonResponse(Response):
    """A JSON body."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body's bytes."""
        return to_json(content)


def error_response(error: ApiError) -> JsonResponse:
    """Return the response for an error."""
    return JsonResponse(error.body, error.status, error.headers)


def install_handlers(app: FastAPI) -> None:
    """Answer every exception in OpenAI's shape."""
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(FomoeError, _on_error)
    app.add_exception_handler(Exception, _on_error)


async def _on_error(_request: Request, error: Exception) -> Response:
    return error_response(api_error(error))


async def _on_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(ApiError(error.status_code, str(error.detail), headers=error.headers))


async def _on_validation(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = _field(first, error.body)
    problem = str(first["msg"])
    if first["type"] == "json_invalid":
        problem, param = f"the body is not valid JSON: {first['ctx']['error']}", None
    elif param is None:
        problem = "the body must be a JSON object"
    return error_response(ApiError(400, f"{param}: {problem}" if param else problem, param=param))


def _field(error: Mapping[str, Any], body: Any) -> str | None:
    """Return the path of a field as the client wrote it, None for the whole body.

    Where a field may be one of several types, pydantic's path names the type that was tried, too;
    that is no part of the body and is left out.
    """
    names, value = [], body
    for part in error["loc"][1:]:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            continue
        names.append(str(part))
    if error["type"] == "missing":
        names += [str(part) for part in error["loc"][1:][-1:]]
    return ".".join(names)[:200] or None
