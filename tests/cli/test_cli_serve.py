from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.tiny_gguf import write_tiny

from fomoe import config
from fomoe.cli.notify import notify
from fomoe.cli.options import ModelOptions
from fomoe.cli.runfile import announced, running_servers, start_ticks, stop_server
from fomoe.cli.serve import HttpServer, banner, curl_line, listen, server_info, url_of
from fomoe.engine.requests import EngineStatus, PromptProgress, Receipt
from fomoe.errors import ConfigError, EngineError, FomoeError
from fomoe.gguf.reader import open_gguf


def test_a_taken_port_is_named_before_anything_is_loaded(
    fomoe: Callable[..., Any], llm: Any, model: Path
) -> None:
    with closing(listen("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        result = fomoe("serve", model, "--port", port)
    assert isinstance(result.exception, ConfigError)
    assert f"port {port}: Address already in use" in str(result.exception)
    assert not hasattr(llm, "last") or llm.last.path != model


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3"])
def test_other_machines_need_a_key(
    fomoe: Callable[..., Any], llm: Any, model: Path, host: str
) -> None:
    result = fomoe("serve", model, "--host", host, "--port", 0)
    assert isinstance(result.exception, ConfigError)
    assert "--api-key-file" in str(result.exception)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.1"):
        listen("203.0.113.1", 0)


def test_urls_can_be_opened_from_here() -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        with closing(listen(host, 0)) as sock:
            assert url_of(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"


def test_the_curl_line_is_one_command() -> None:
    words = shlex.split(curl_line("http://127.0.0.1:8000", needs_key=False))
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:8000/v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert body["messages"][0]["role"] == "user"
    assert "Authorization: Bearer" in curl_line("http://h:1", needs_key=True)
    assert "http://h:1/v1/completions" in curl_line("http://h:1", needs_key=False, is_demo=True)


def test_the_banner_tells_what_the_demo_model_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "__file__", str(tmp_path / "fomoe" / "config.py"))
    demo = tmp_path / "models" / config.BUNDLED_MODEL
    demo.parent.mkdir()
    write_tiny(demo)
    megabytes = round(demo.stat().st_size / 1e6)
    told = f"demo model, {megabytes} MB, fluent but knows nothing"
    assert told in banner(ModelOptions())
    other = write_tiny(tmp_path / "other.gguf", shard_tensors=20)
    whole = sum(shard.stat().st_size for shard in tmp_path.glob("other*.gguf"))
    assert banner(ModelOptions(model=other)) == f"{other.name}: {config.format_bytes(whole)}"


@pytest.mark.parametrize("name", ["nowhere.gguf", "", "."])
def test_a_model_that_is_not_there_is_named(fomoe: Callable[..., Any], llm: Any, name: str) -> None:
    before = getattr(llm, "last", None)
    result = fomoe("serve", name, "--port", 0)
    assert isinstance(result.exception, FomoeError)
    assert str(Path(name)) in str(result.exception)
    assert getattr(llm, "last", None) is before


def test_the_server_knows_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", shard_tensors=20)
    info = server_info(open_gguf(path), config.ServerConfig())
    shards = sum(shard.stat().st_size for shard in tmp_path.glob("*.gguf"))
    assert (info.model_id, info.size_bytes, info.n_ctx_train) == (path.stem, shards, 4096)
    assert info.n_params is not None
    assert info.n_params > 4 * 32 * 3 * 256 * 256
    assert info.allowed_hosts == ()
    info.on_answer(Receipt(generated_tokens=10, generated_ms=1000.0, hits_device=1))
    assert capsys.readouterr().out == "10 tok/s | device 100 %  ram 0 %  nvme 0 % | exact\n"
    fields = {"request_id": "a", "total": 9, "cached": 0}
    for processed, time_ms in ((1, 4900.0), (2, 5000.0), (3, 9900.0), (4, 10_000.0), (9, 2e4)):
        info.on_progress(PromptProgress(processed=processed, time_ms=time_ms, **fields))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in said] == [
        "prompt 2 of 9 tokens", "prompt 4 of 9 tokens",
    ]  # fmt: skip
    public = config.ServerConfig(host="0.0.0.0", api_key="k", model_name="mine")
    info = server_info(open_gguf(path), public)
    assert (info.model_id, info.api_key, info.allowed_hosts) == ("mine", "k", None)


async def quiet(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers nothing."""


def test_an_engine_that_has_stopped_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fomoe.cli.serve.WATCH_S", 0.01)
    states = iter(["ready", "ready", "degraded"])

    def status() -> EngineStatus:
        return EngineStatus(state=next(states, "stopped"), detail="the drive is gone")

    with (
        closing(listen("127.0.0.1", 0)) as sock,
        pytest.raises(EngineError, match="the drive is gone"),
    ):
        HttpServer(quiet, status).answer(sock)


def test_a_signal_says_what_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    server = HttpServer(quiet, lambda: EngineStatus(state="ready"))
    server.server_state.tasks = {object(), object()}
    server.handle_exit(signal.SIGINT, None)
    assert capsys.readouterr().out == "\nwaiting up to 30 s for 2 answers; Ctrl-C again ends it\n"
    server.handle_exit(signal.SIGINT, None)
    assert server.force_exit
    assert capsys.readouterr().out == ""


def test_systemd_hears_of_it(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        notify(str(tmp_path / "notify"), "READY=1")
        assert listener.recv(100) == b"READY=1"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0fomoe-test-notify")
        notify("@fomoe-test-notify", "STOPPING=1")
        assert listener.recv(100) == b"STOPPING=1"
    notify(None, "READY=1")


def test_a_running_server_can_be_found(tmp_path: Path) -> None:
    with announced(tmp_path, url="http://h:1", model="m.gguf"):
        (server,) = running_servers(tmp_path)
        assert server.url == "http://h:1"
    assert running_servers(tmp_path) == []


def announce_child(directory: Path, code: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    started = start_ticks(child.pid)
    facts = {"pid": child.pid, "started": started, "url": "http://h:1", "model": "m"}
    (directory / f"serve-{child.pid}.json").write_text(json.dumps(facts))
    return child


WAIT = "import time; print(flush=True); time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAIT}"


def test_stop_ends_the_server(fomoe: Callable[..., Any]) -> None:
    with announce_child(config.runtime_dir(), WAIT) as child:
        result = fomoe("stop")
        assert result.stdout == f"stopped http://h:1 (m, pid {child.pid})\n"
        assert child.wait(timeout=10) == -15
    assert fomoe("stop").stdout == "no server of this user is running\n"
    assert json.loads(fomoe("stop", "--json").stdout) == []


def test_stop_can_be_told_which_server(fomoe: Callable[..., Any]) -> None:
    with announce_child(config.runtime_dir(), WAIT) as child:
        assert fomoe("stop", "--port", 11).stdout.endswith("is running on port 11\n")
        assert child.poll() is None
        assert fomoe("stop", "--port", 1).stdout.startswith("stopped http://h:1 ")
        assert child.wait(timeout=10) == -15


def test_a_server_that_does_not_stop_is_named(fomoe: Callable[..., Any]) -> None:
    with announce_child(config.runtime_dir(), DEAF) as child:
        result = fomoe("stop", "--timeout", "0.2")
        assert f"kill -9 {child.pid}" in str(result.exception)
        child.kill()


def test_another_process_with_the_same_pid_is_left_alone(tmp_path: Path) -> None:
    with announce_child(tmp_path, WAIT) as child:
        path = tmp_path / f"serve-{child.pid}.json"
        facts = json.loads(path.read_text())
        (server,) = running_servers(tmp_path)
        path.write_text(json.dumps(facts | {"started": facts["started"] - 1}))
        assert running_servers(tmp_path) == []
        assert not path.exists()
        child.kill()
        child.wait()
        assert stop_server(server, timeout_s=1.0)


def test_a_damaged_file_is_removed(tmp_path: Path) -> None:
    (tmp_path / "serve-1.json").write_text("{")
    (tmp_path / "serve-2.json").write_text('{"pid": 1}')
    assert running_servers(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_the_runtime_directory_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    directory = config.runtime_dir()
    assert directory.parent == tmp_path
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.rmdir()
    directory.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="belongs to another user"):
        config.runtime_dir()
