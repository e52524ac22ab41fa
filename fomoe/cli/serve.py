"""`fomoe serve`: the HTTP server in the foreground, with the actors under it."""

from __future__ import annotations

import json
import math
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from types import FrameType
from typing import TYPE_CHECKING

import typer
import uvicorn

from fomoe.cli.notify import notify
from fomoe.cli.opening import opened
from fomoe.cli.options import EngineOptions, ModelOptions, ServerOptions, TraceOptions
from fomoe.cli.runfile import announced
from fomoe.config import (
    BUNDLED_MODEL,
    ServerConfig,
    format_bytes,
    is_loopback,
    notify_socket,
    runtime_dir,
)
from fomoe.engine.requests import EngineStatus, PromptProgress
from fomoe.errors import ConfigError, EngineError
from fomoe.gguf.reader import GGUFFile, open_gguf
from fomoe.model.archs import read_spec
from fomoe.server.info import ServerInfo
from fomoe.server.receipts import prompt_line, tier_line

if TYPE_CHECKING:
    from fastapi import FastAPI

    from fomoe.llm import LLM

# Requests in flight get this long after SIGTERM; the systemd unit waits 15 s longer.
DRAIN_S = 30
WATCH_S = 0.5


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, so that a taken port is known before a model is loaded.

    Raises:
        ConfigError: the address is not this machine's, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; stop what uses it "
            "(`fomoe stop` for a server of ours) or choose another with --port"
        ) from None


_QUESTION = {"messages": [{"role": "user", "content": "Tell me a short story about a fox."}]}
_STORY = {"prompt": "Once upon a time", "max_tokens": 120, "temperature": 0.6}


def url_of(sock: socket.socket) -> str:
    """Return the URL under which a client on this machine reaches the socket."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def curl_line(url: str, *, needs_key: bool, is_demo: bool = False) -> str:
    """Return a command to paste into another shell; the demo model tells stories best."""
    what, prompt = ("completions", _STORY) if is_demo else ("chat/completions", _QUESTION)
    body = {**prompt, "stream": True}
    key = ' -H "Authorization: Bearer $FOMOE_API_KEY"' if needs_key else ""
    return (
        f"curl -N {url}/v1/{what} -H 'Content-Type: application/json'{key} "
        f"-d {shlex.quote(json.dumps(body))}"
    )


def banner(model: ModelOptions) -> str:
    """Return what is served; of the bundled model also what not to expect of it.

    Raises:
        GGUFError: it is not there, or no model.
    """
    size = sum(open_gguf(model.path).shard_bytes)
    if model.is_demo:
        return (
            f"{model.path.name}: demo model, {round(size / 1e6)} MB, fluent but knows nothing; "
            "fomoe serve MODEL.gguf runs a real one"
        )
    return f"{model.path.name}: {format_bytes(size)}"


class LongPrompts:
    """Says every few seconds how far a prompt is that takes longer than that."""

    PERIOD_MS = 5000.0

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: tuple[str, float] = ("", 0.0)  # of which request, and at what time in it

    def __call__(self, progress: PromptProgress) -> None:
        """Take news of a prompt."""
        request, at = self._said
        before = at if request == progress.request_id else 0.0
        is_over = progress.processed == progress.total
        if progress.time_ms - before >= self.PERIOD_MS and not is_over:
            self._said = progress.request_id, progress.time_ms
            self._say(prompt_line(progress))


def server_info(file: GGUFFile, config: ServerConfig) -> ServerInfo:
    """Return what the HTTP server says about the model; each answer's tier line is printed."""
    return ServerInfo(
        model_id=config.model_name or file.path.stem,
        n_params=sum(math.prod(tensor.shape) for tensor in file.tensors.values()),
        size_bytes=sum(file.shard_bytes),
        n_ctx_train=read_spec(file).ctx_train,
        api_key=config.api_key,
        allowed_hosts=() if is_loopback(config.host) else None,
        on_answer=lambda receipt: typer.echo(tier_line(receipt)),
        on_progress=LongPrompts(typer.echo),
    )


def _stop_on_sigterm() -> None:
    def leave(_signal: int, _frame: FrameType | None) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)


class HttpServer(uvicorn.Server):
    """Answers until a signal, or until the engine has stopped for good."""

    def __init__(self, app: FastAPI, status: Callable[[], EngineStatus]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=DRAIN_S,
            )
        )
        self._status = status
        self._over = threading.Event()

    def answer(self, sock: socket.socket) -> None:
        """Answer requests on a listening socket.

        Raises:
            EngineError: the engine has stopped.
        """
        watch = threading.Thread(target=self._watch, name="fomoe-engine-watch", daemon=True)
        watch.start()
        self.run(sockets=[sock])
        self._over.set()
        watch.join()
        status = self._status()
        if status.state == "stopped":
            raise EngineError(status.detail)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal (uvicorn); says what is waited for."""
        count = len(self.server_state.tasks)
        if count and not self.should_exit:
            what = "an answer" if count == 1 else f"{count} answers"
            typer.echo(f"\nwaiting up to {DRAIN_S} s for {what}; Ctrl-C again ends it")
        super().handle_exit(sig, frame)

    def _watch(self) -> None:
        while not self._over.wait(WATCH_S):
            if self._status().state == "stopped":
                self.should_exit = True
                return


def _answer_requests(llm: LLM, config: ServerConfig, sock: socket.socket) -> None:
    # Imported here because FastAPI takes half a second, which the other verbs can spare.
    from fomoe.server.app import create_app

    url, name = url_of(sock), llm.file.path.name
    app = create_app(llm.engine, llm.tokenizer, llm.chat, server_info(llm.file, config))
    typer.echo(llm.plan_text())
    typer.echo(f"\n{llm.cluster_text()}")
    needs_key, is_demo = config.api_key is not None, name == BUNDLED_MODEL
    command = curl_line(url, needs_key=needs_key, is_demo=is_demo)
    typer.echo(f"\nReady. Try it:\n{command}\n")
    notify(notify_socket(), f"READY=1\nSTATUS=serving {name} on {url}")
    try:
        HttpServer(app, llm.engine.status).answer(sock)
    finally:
        notify(notify_socket(), "STOPPING=1")


def serve(
    model: ModelOptions, engine: EngineOptions, server: ServerOptions, recording: TraceOptions
) -> None:
    """Serve a model over an OpenAI-compatible API until Ctrl-C or `fomoe stop`."""
    config = server.config()
    _stop_on_sigterm()
    said = banner(model)
    with (
        closing(listen(config.host, config.port)) as sock,
        announced(runtime_dir(), url=url_of(sock), model=model.path.name),
    ):
        typer.echo(f"{said}\nstarting Ray and loading the model ...\n")
        notify(notify_socket(), f"STATUS=loading {model.path.name}")
        with opened(model, engine, name="fomoe", trace=recording.trace) as llm:
            # Ray installs a handler of its own while it starts.
            _stop_on_sigterm()
            _answer_requests(llm, config, sock)
