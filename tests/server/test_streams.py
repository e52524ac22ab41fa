"""Streams over real sockets: disconnects, silence, clients that do not read."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from server_harness import Server, frames, listening, saying, wait_until
from support.small_vocab import small_tokenizer

from fomoe.engine.requests import Event, GenerateRequest

Serve = Callable[..., Server]
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
GONE_WITHIN_S = 0.5


def endless(text: str = "on and on ") -> Any:
    return saying(text * 400, end=False)


def request_bytes(body: Any, path: str = "/v1/chat/completions") -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["prompt", "decode"])
def test_a_client_that_leaves_takes_its_work_along(
    serve: Serve, path: str, stream: bool, stage: str
) -> None:
    prompt_delay = 60.0 if stage == "prompt" else 0.0
    engine = FakeEngine(endless(), delay=0.02, prompt_delay=prompt_delay)  # lasts 20 s or more
    body = CHAT | {"prompt": "Hi", "stream": stream, "n": 2, "max_tokens": 1000}
    server = serve(engine=engine)
    waits = []
    with listening(server.app) as url:
        # A busy machine is late for reasons of its own, but not three times in a row.
        while len(waits) < 3 and min(waits, default=1.0) >= GONE_WITHIN_S:
            engine.said = 0
            with closing(connect(url)) as client:
                client.sendall(request_bytes(body, path))
                wait_until(lambda: len(engine.running) == 2)
                wait_until(lambda: stage == "prompt" or engine.said > 10)
            waits.append(wait_until(lambda: not engine.running))
        said = engine.said
        counted = f'cancelled_total{{stage="{stage}"}} {len(waits)}.0'
        wait_until(lambda: counted in httpx.get(f"{url}/metrics").text)
    assert min(waits) < GONE_WITHIN_S
    assert max(waits) < 10
    assert len(engine.cancelled) == 2 * len(waits)
    assert engine.said == said


def test_clients_that_leave_at_any_byte_disturb_nobody(serve: Serve) -> None:
    rng = random.Random(7)
    engine = FakeEngine(endless(), delay=0.001)
    server = serve(engine=engine, max_pending=1000)
    with listening(server.app) as url, httpx.Client(base_url=url, timeout=20) as steady:
        whole = steady.post("/v1/chat/completions", json=CHAT | {"max_tokens": 40}).json()
        for round_number in range(60):
            stream = bool(round_number % 2)
            data = request_bytes(CHAT | {"stream": stream})
            sent = data[: rng.randrange(1, len(data) + 1)] if rng.random() < 0.3 else data
            client = connect(url)
            client.sendall(sent)
            if stream and sent is data and rng.random() < 0.7:
                client.recv(rng.randrange(1, 400))
            if rng.random() < 0.3:  # a reset instead of an orderly end
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        again = steady.post("/v1/chat/completions", json=CHAT | {"max_tokens": 40}).json()
        assert again["choices"] == whole["choices"]
        wait_until(lambda: not engine.running)
        assert len(engine.finished) + len(engine.cancelled) == len(engine.asked)
        assert steady.get("/health").status_code == 200


def test_silence_is_filled_with_pings_that_tell_how_far_it_is(serve: Serve) -> None:
    engine = FakeEngine(saying("a"), prompt_delay=1.2)
    server = serve(engine=engine, ping_s=0.1)
    gaps, comments = [], []
    with (
        listening(server.app) as url,
        httpx.Client(base_url=url, timeout=20) as client,
        client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as response,
    ):
        last = time.monotonic()
        for line in response.iter_lines():
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
            if line.startswith(":"):
                comments.append(line)
    total = len(engine.asked[0].prompt)
    assert comments[0] == ": ping"
    assert comments[-1] == f": prompt {total // 2}/{total}"
    assert len(comments) >= 3
    assert max(gaps) < 5


def test_a_slow_client_gets_everything(serve: Serve) -> None:
    text = "on and on " * 100
    server = serve(text)
    with listening(server.app) as url, closing(connect(url)) as client:
        client.sendall(request_bytes(CHAT | {"stream": True}))
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += client.recv(2000)
            time.sleep(0.001)
    assert data.count(b"data: ") > 100
    assert b"data: [DONE]" in data


def test_a_client_that_does_not_read_is_given_up_and_little_is_kept_for_it(serve: Serve) -> None:
    engine = FakeEngine(lambda request: small_tokenizer().encode("on " * 100_000), ctx_size=1 << 20)
    server = serve(engine=engine, stall_s=0.5)
    body = CHAT | {"stream": True, "logprobs": True, "top_logprobs": 20}
    frame_bytes = 1000  # with so many alternatives a frame has at least this
    with listening(server.app) as url, closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = url.removeprefix("http://").split(":")
        client.connect((host, int(port)))
        client.sendall(request_bytes(body))
        wait_until(lambda: engine.running)
        wait_until(lambda: not engine.running)
        assert len(engine.cancelled) == 1
        # The kernel may take some MiB for a socket; the server itself holds next to nothing.
        assert engine.said * frame_bytes < 16 << 20
        assert httpx.get(f"{url}/health").status_code == 200


def test_other_streams_go_on_beside_a_stuck_one(serve: Serve) -> None:
    engine = FakeEngine(endless(), delay=0.0005, ctx_size=1 << 20)
    server = serve(engine=engine, stall_s=20.0)
    with listening(server.app) as url, closing(connect(url)) as stuck:
        stuck.sendall(request_bytes(CHAT | {"stream": True}))
        wait_until(lambda: engine.said > 50)
        with httpx.Client(base_url=url, timeout=20) as client:
            values = frames(
                client.post("/v1/chat/completions", json=CHAT | {"stream": True, "max_tokens": 50})
            )
        assert values[-1] == "[DONE]"


def test_a_failure_in_a_stream_ends_it_without_done(serve: Serve) -> None:
    server = serve(engine=FakeEngine(saying("Hello there"), fail_after=3, delay=0.01))
    with listening(server.app) as url, httpx.Client(base_url=url, timeout=20) as client:
        text = client.post("/v1/chat/completions", json=CHAT | {"stream": True}).text
    assert "[DONE]" not in text
    assert text.count('data: {"error":') == 1
    assert text.endswith("}\n\n")


def test_the_server_stops_with_streams_open(serve: Serve) -> None:
    engine = FakeEngine(endless(), delay=0.01)
    server = serve(engine=engine)
    with (
        listening(server.app, timeout_graceful_shutdown=1) as url,
        httpx.Client(base_url=url, timeout=20) as client,
        client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        wait_until(lambda: engine.said > 3)
    assert not engine.running


class SlowToLeave(FakeEngine):
    """Takes a while to end a request, during which a closing event loop cancels once more."""

    async def _events(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        try:
            async for event in super()._events(request):
                yield event
        finally:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.3)


@pytest.mark.parametrize("engine_of", [FakeEngine, SlowToLeave])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_requests_that_outlive_the_server_get_an_error(
    serve: Serve, capfd: pytest.CaptureFixture[str], path: str, engine_of: type[FakeEngine]
) -> None:
    engine = engine_of(endless(), delay=0.01)
    body = CHAT | {"prompt": "Hi", "max_tokens": 2000}

    def answer(url: str, stream: bool) -> httpx.Response:
        return httpx.post(url + path, json=body | {"stream": stream}, timeout=20)

    with ThreadPoolExecutor() as threads:
        with listening(serve(engine=engine).app, timeout_graceful_shutdown=0.2) as url:
            answers = [threads.submit(answer, url, stream) for stream in (True, False)]
            wait_until(lambda: len(engine.running) == 2 and engine.said > 10)
        streamed, plain = (one.result() for one in answers)
    assert streamed.status_code == 200
    begun, _, last = streamed.text.rpartition("data: ")
    assert begun.count('data: {"id":') > 3
    assert "[DONE]" not in streamed.text
    assert last.endswith("}\n\n")
    assert plain.status_code == 503
    for error in (json.loads(last)["error"], plain.json()["error"]):
        assert (error["type"], error["code"]) == ("unavailable_error", 503)
        assert "the server is stopping" in error["message"]
    assert not engine.running
    assert len(engine.cancelled) == 2
    printed = capfd.readouterr().err
    assert "Cancel 2 running task(s)" in printed
    assert "Traceback" not in printed


def test_requests_that_are_not_read_yet_get_an_error_too(
    serve: Serve, capfd: pytest.CaptureFixture[str]
) -> None:
    data = request_bytes(CHAT)
    with listening(serve("a").app, timeout_graceful_shutdown=0.2) as url:
        client = connect(url)
        client.sendall(data[:-5])
        time.sleep(0.2)
    with closing(client), client.makefile("rb") as file:
        head, _, body = file.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503")
    assert json.loads(body)["error"]["code"] == 503
    printed = capfd.readouterr().err
    assert "Cancel 1 running task(s)" in printed
    assert "Traceback" not in printed
