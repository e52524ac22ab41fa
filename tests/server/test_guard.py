from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fake_engine import FakeEngine
from server_harness import Server, saying
from starlette.routing import BaseRoute

from fomoe.engine.requests import EngineStatus
from fomoe.server.guard import host_name

Serve = Callable[..., Server]
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
MADE_UP = {"model_id": "x"}


def routes_of(server: Server) -> list[tuple[str, str]]:
    """Every (method, path) of the application, as its own description and its router list them."""
    described = server.call("GET", "/openapi.json").json()["paths"]
    found = {(m.upper(), path) for path, methods in described.items() for m in methods}

    def walk(routes: list[BaseRoute]) -> None:
        for route in routes:
            walk(getattr(route, "routes", None) or [])
            for method in getattr(route, "methods", None) or ():
                found.add((method, route.path))  # type: ignore[attr-defined]

    walk(server.app.routes)
    return sorted(
        (m, p.replace("{model_id:path}", "x").replace("{model_id}", "x")) for m, p in found
    )


def test_every_route_but_health_asks_for_the_key(serve: Serve) -> None:
    routes = routes_of(serve("a"))
    expected = {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/x",
        "/v1/responses",
        "/v1/embeddings",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
        "/metrics",
        "/openapi.json",
    }
    assert {path for _, path in routes} == expected
    locked = serve("a", api_key="sécret")
    open_without_key = set()
    for method, path in [*routes, ("GET", "/nothing/here"), ("OPTIONS", "/v1/models")]:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic sécret".encode()},
            {"authorization": "Bearer"},
            {"x-api-key": "s"},
        ):
            response = locked.call(method, path, headers=headers)
            if response.status_code != 401:
                open_without_key.add(path)
            elif method != "HEAD":
                assert response.json()["error"]["type"] == "authentication_error"
                assert response.headers["www-authenticate"] == "Bearer"
    assert open_without_key == {"/health"}


@pytest.mark.parametrize(
    "headers", [{"authorization": b"Bearer s\xc3\xa9cret"}, {"x-api-key": b"s\xc3\xa9cret"}]
)
def test_the_key_opens(serve: Serve, headers: Any) -> None:
    server = serve("a", api_key="sécret")
    assert server.call("GET", "/v1/models", headers=headers).status_code == 200
    assert server.post("/v1/chat/completions", CHAT, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8000", 200),
        ("localhost:1", 200),
        ("LOCALHOST.", 200),
        ("[::1]:8000", 200),
        ("127.9.9.9", 200),
        ("box.lan:8000", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.1", 403),
        ("", 403),
        ("[::1", 200),
        ("::1", 403),
    ],
)
def test_only_names_of_this_server_are_answered(serve: Serve, host: str, status: int) -> None:
    server = serve("a", allowed_hosts=("Box.lan",))
    for path in ("/v1/models", "/health"):
        response = server.call("GET", path, headers={"host": host})
        assert response.status_code == status
    assert serve("a", allowed_hosts=None).call("GET", "/health", headers={"host": host}).is_success


def test_host_names() -> None:
    assert host_name("[FE80::1]:80") == "fe80::1"
    assert host_name("A.B.:1") == "a.b"


def test_two_hosts_are_one_too_many(serve: Serve) -> None:
    headers = [("host", "127.0.0.1"), ("host", "localhost")]
    assert serve("a").call("GET", "/health", headers=headers).status_code == 403


def test_no_origin_is_let_in(serve: Serve) -> None:
    headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    server = serve("a")
    for response in (
        server.call("OPTIONS", "/v1/chat/completions", headers=headers),
        server.post("/v1/chat/completions", CHAT, headers=headers),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "x+json2"]
)
def test_only_json_is_taken(serve: Serve, kind: str | None) -> None:
    server = serve("a")
    headers = {} if kind is None else {"content-type": kind}
    response = server.call(
        "POST", "/v1/chat/completions", content=json.dumps(CHAT), headers=headers
    )
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]
    for good in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/x+json"):
        headers = {"content-type": good}
        assert server.post("/v1/chat/completions", CHAT, headers=headers).status_code == 200


def test_long_bodies_are_refused(serve: Serve) -> None:
    server = serve("a", max_body_bytes=100)
    assert server.post("/tokenize", {"content": "a" * 80}).status_code == 200
    assert server.post("/tokenize", {"content": "a" * 100}).status_code == 413
    assert server.call("GET", "/health", headers={"content-length": "x"}).status_code == 400

    async def without_length() -> int:
        async def parts() -> Any:
            for _ in range(20):
                yield b"a" * 10

        async with server.client() as client:
            headers = {"content-type": "application/json"}
            response = await client.post("/tokenize", content=parts(), headers=headers)
            assert "100 bytes" in response.json()["error"]["message"]
            return response.status_code

    assert asyncio.run(without_length()) == 413


@pytest.mark.parametrize("stream", [False, True])
def test_more_requests_than_there_is_room_for_are_sent_away(serve: Serve, stream: bool) -> None:
    engine = FakeEngine(saying("Hello there"), delay=0.01)
    server = serve(engine=engine, max_pending=3, retry_after_s=7)

    async def storm() -> list[Any]:
        async with server.client() as client:
            calls = [
                client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
                for _ in range(50)
            ]
            return await asyncio.gather(*calls)

    responses = asyncio.run(storm())
    accepted = [r for r in responses if r.status_code == 200]
    refused = [r for r in responses if r.status_code == 429]
    assert (len(accepted), len(refused)) == (3, 47)
    assert {r.headers["retry-after"] for r in refused} == {"7"}
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert not stream or all(r.text.endswith("data: [DONE]\n\n") for r in accepted)
    assert server.post("/v1/chat/completions", CHAT).status_code == 200


@pytest.mark.parametrize(
    ("state", "health", "ready", "chat"),
    [
        ("loading", 503, 503, 503),
        ("ready", 200, 200, 200),
        ("degraded", 200, 503, 503),
        ("stopped", 503, 503, 503),
    ],
)
def test_states_of_the_engine(serve: Serve, state: Any, health: int, ready: int, chat: int) -> None:
    server = serve("a")
    server.engine.state = EngineStatus(
        state=state, load_progress=0.43, detail="storage is back soon"
    )
    assert server.call("GET", "/health").status_code == health
    assert server.call("GET", "/ready").status_code == ready
    response = server.post("/v1/chat/completions", CHAT)
    assert response.status_code == chat
    assert server.call("HEAD", "/health").status_code == health
    assert server.call("GET", "/ready").json()["detail"] == "storage is back soon"
    assert "detail" not in server.call("GET", "/health").json()
    if state == "loading":
        assert server.call("GET", "/health").json()["progress"] == 0.43
        assert server.call("GET", "/health").json()["error"]["message"] == "Loading model"
        assert response.json()["error"]["type"] == "unavailable_error"
        assert response.json()["error"]["message"] == "Loading model: 43%"
        assert response.headers["retry-after"] == "5"
        assert server.call("GET", "/v1/models").status_code == 200
