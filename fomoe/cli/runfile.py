"""A small file per running server, by which `fomoe stop` finds it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

_PREFIX = "serve-"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """A server process; `started` (clock ticks since boot) tells it from a later one of its pid."""

    pid: int
    started: int
    url: str
    model: str


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None where it does not exist.

    Source: proc(5), field 22 of /proc/PID/stat, counted behind the parenthesised name.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


@contextmanager
def announced(directory: Path, *, url: str, model: str) -> Iterator[None]:
    """Leave a file about this process in `directory` while the body runs."""
    pid = os.getpid()
    server = RunningServer(pid=pid, started=start_ticks(pid) or 0, url=url, model=model)
    path = directory / f"{_PREFIX}{pid}.json"
    path.write_text(json.dumps(asdict(server)))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def running_servers(directory: Path) -> list[RunningServer]:
    """Return the servers that announced themselves and live; files of dead ones are removed."""
    servers = []
    for path in sorted(directory.glob(f"{_PREFIX}*.json")):
        try:
            server = RunningServer(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            server = None
        if server is not None and start_ticks(server.pid) == server.started:
            servers.append(server)
        else:
            path.unlink(missing_ok=True)
    return servers


def stop_server(server: RunningServer, timeout_s: float) -> bool:
    """Send SIGTERM and wait for the end; False where the process outlives the timeout."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(server.pid)
        try:
            # The pidfd pins the process, so from here on the pid cannot mean another one.
            if start_ticks(server.pid) != server.started:
                return True
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            return bool(select.select([pidfd], [], [], timeout_s)[0])
        finally:
            os.close(pidfd)
    return True
