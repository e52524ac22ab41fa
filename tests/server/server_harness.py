"""An application around a scripted engine, and ways to call it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import uvicorn
from fake_engine import FakeEngine
from support.small_vocab import IM_END, small_tokenizer

from fomoe.engine.requests import GenerateRequest
from fomoe.model.chat import ChatTemplate
from fomoe.server.app import create_app
from fomoe.server.info import ServerInfo

BASE = "http://127.0.0.1:8000"
# ChatML that opens the thinking for the model unless it is told not to, as Qwen3.5's does.
THINKING_TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>tools\\n' + tools|tojson + '<|im_end|>\\n' }}{% endif -%}"
    "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{%- elif enable_thinking is true %}{{ '<think>\\n' }}{% endif -%}"
)


def saying(text: str, *, end: bool = True) -> Callable[[GenerateRequest], list[int]]:
    """A script that says `text` whatever the question is."""
    ids = small_tokenizer().encode_special(text) + [IM_END] * end
    return lambda request: ids


class Server:
    """An application around an engine, called without sockets."""

    def __init__(self, engine: FakeEngine, template: ChatTemplate, **info: Any) -> None:
        self.receipts: list[Any] = []
        self.engine = engine
        self.info = ServerInfo(**{"model_id": "tiny", "on_answer": self.receipts.append} | info)
        self.app = create_app(engine, small_tokenizer(), template, self.info)

    @asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, **{"base_url": BASE} | options) as client:
            yield client

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, **options)

        return asyncio.run(once())

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        headers = {"content-type": "application/json"} | options.pop("headers", {})
        return self.call("POST", path, content=json.dumps(body), headers=headers, **options)

    def chat(self, text: str = "Hi", **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", {"messages": messages} | body)

    def complete(self, prompt: Any = "Hi", **body: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt} | body)


def frames(response: httpx.Response) -> list[Any]:
    """The values of a finished stream's frames; comments are left out, [DONE] is a string."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    values: list[Any] = []
    for block in response.text.split("\n\n")[:-1]:
        if not block.startswith(":"):
            data = block.removeprefix("data: ")
            values.append(data if data == "[DONE]" else json.loads(data))
    return values


@contextmanager
def listening(app: Any, **options: Any) -> Iterator[str]:
    """Serve an application on a real socket; yields its URL."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="warning", ws="none", **options
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_until(true: Callable[[], object], timeout_s: float = 20.0) -> float:
    """Wait for a condition; returns the seconds that it took."""
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < timeout_s
        time.sleep(0.005)
    return time.monotonic() - started
