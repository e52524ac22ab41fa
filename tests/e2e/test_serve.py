"""`fomoe serve` as a person runs it: processes, HTTP, signals, a cluster that was there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "fomoe-demo-Q4_K_M.gguf"
RAY = Path(sys.executable).with_name("ray")
START_S = 120.0


@dataclass
class Server:
    """A running `fomoe serve` and what it printed so far."""

    process: subprocess.Popen[str]
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def url(self) -> str:
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", self.text)
        assert found is not None, self.text
        return f"http://127.0.0.1:{found[1]}"

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def shell(home: Path, **more: str) -> dict[str, str]:
    """The environment of a clean shell with its own home (where Ray keeps its token)."""
    keep = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
    return keep | {"HOME": str(home), "PYTHONUNBUFFERED": "1"} | more


@contextlib.contextmanager
def serve(log: Path, env: dict[str, str], *arguments: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "fomoe.cli", "serve", "--port", "0", *arguments]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, text=True
        )
    server = Server(process, log)
    try:
        deadline = time.monotonic() + START_S
        while "Ready." not in server.text:
            assert process.poll() is None, server.text
            assert time.monotonic() < deadline, server.text
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def ray_head(env: dict[str, str], log: Path) -> Iterator[str]:
    """A cluster as `ray start --head` makes it; yields its address."""
    port = free_port()
    command = [
        str(RAY), "start", "--head", f"--port={port}", f"--ray-client-server-port={free_port()}",
        "--include-dashboard=false", "--object-store-memory=100000000", "--disable-usage-stats",
        "--num-cpus=2", "--block",
    ]  # fmt: skip
    with log.open("w") as out:
        head = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_S
        # The address comes some lines after the news that Ray has started.
        while (address := re.search(r"--address='([^']+)'", log.read_text())) is None:
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield address[1]
        assert head.poll() is None, "the cluster must outlive fomoe serve"
    finally:
        children = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(30)
        for child in psutil.wait_procs(children, timeout=10)[1]:
            child.kill()


def ask(server: Server, **more: object) -> list[str]:
    """The data lines of a streamed chat answer."""
    body = {
        "messages": [{"role": "user", "content": "Tell me a short story about a fox."}],
        "stream": True, "max_tokens": 24, "seed": 1, **more,
    }  # fmt: skip
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as answer:
        assert answer.status_code == 200
        return [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]


def content(lines: list[str]) -> str:
    chunks = [json.loads(line) for line in lines[:-1]]
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


def all_gone(processes: list[psutil.Process], within_s: float) -> bool:
    """Whether they end in time; one that nobody reaps (no init in a container) has ended too."""
    deadline = time.monotonic() + within_s
    while any(_runs(p) for p in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_serve_starts_ray_answers_and_leaves_nothing(tmp_path: Path) -> None:
    env = shell(tmp_path)
    shm_before = {p.name for p in Path("/dev/shm").iterdir()}
    with serve(tmp_path / "log", env, "--address", "local") as server:
        lines = ask(server)
        assert lines[-1] == "[DONE]"
        said = content(lines).replace("\n", " ")
        assert len(said) >= 8, said
        assert said.isprintable(), said
        assert "\ufffd" not in said, said
        assert re.search(
            r"\d+ tok/s \| device \(emulated\) \d+ %  ram \d+ %  nvme \d+ % \| exact", server.text
        )
        assert "demo model, 32 MB, fluent but knows nothing" in server.text
        listing = re.search(r"^(RAY_AUTH_MODE=token .*ray list actors .*)$", server.text, re.M)
        assert listing is not None, server.text
        shown = subprocess.run(
            listing[1], shell=True, env=shell(tmp_path), capture_output=True, text=True, timeout=60
        ).stdout
        assert [shown.count(c) for c in ("FomoeDriver", "FomoeStorage", "FomoeGPU")] == [1, 1, 2]
        token = tmp_path / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o077 == 0
        children = server.children()
    assert server.process.returncode == 0, server.text
    assert all_gone(children, 15)
    assert {p.name for p in Path("/dev/shm").iterdir()} <= shm_before


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_serve_joins_a_running_cluster_and_leaves_it_up(tmp_path: Path, mode: str) -> None:
    env = shell(tmp_path, RAY_AUTH_MODE=mode)
    if mode == "token":
        subprocess.run([RAY, "get-auth-token", "--generate"], env=env, check=True, timeout=60,
                       capture_output=True)  # fmt: skip
    # The server's shell says nothing about tokens: it finds out.
    with ray_head(env, tmp_path / "ray.log") as address:
        clean = shell(tmp_path, RAY_ADDRESS=address)
        with serve(tmp_path / "log", clean) as server:
            assert ("without a token" in server.text) == (mode == "disabled")
            first = content(ask(server))
            again = content(ask(server, car=0.0))
            assert first == again != ""
            lossy = ask(server, car=0.6, stream_options={"include_usage": True})
            usage = json.loads(lossy[-2])["timings"]["fomoe"]
            assert usage["mode"] == "car=0.6"
            pids = actor_pids(clean, address, mode)
            assert len(pids) == 4
        assert server.process.returncode == 0, server.text
        assert all_gone([psutil.Process(p) for p in pids if psutil.pid_exists(p)], 10)


def actor_pids(env: dict[str, str], address: str, mode: str) -> list[int]:
    """Process ids of fomoe's actors, asked of Ray from another shell."""
    program = (
        "import ray, sys; ray.init(address=sys.argv[1], namespace='fomoe', log_to_driver=False);"
        "print(*[ray.get(ray.get_actor(n['name'], namespace='fomoe').pid.remote())"
        " for n in ray.util.list_named_actors(all_namespaces=True) if n['namespace'] == 'fomoe'])"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, address], env={**env, "RAY_AUTH_MODE": mode},
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    return [int(pid) for pid in out.split()]


def test_a_killed_server_takes_its_actors_along(tmp_path: Path) -> None:
    with serve(tmp_path / "log", shell(tmp_path), "--address", "local") as server:
        children = server.children()
        names = {p.pid: " ".join(_argv(p)) for p in children}
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(10)
        # Agents of Ray itself may stay after such a death; what holds our memory must not.
        agents = [p for p in children if "Agent" in names[p.pid]]
        assert sum("Fomoe" in name for name in names.values()) == 4
        assert all_gone([p for p in children if p not in agents], 15)
        for agent in agents:
            with contextlib.suppress(psutil.Error):
                agent.kill()


def _argv(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []
