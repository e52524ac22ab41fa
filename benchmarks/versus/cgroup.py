"""A memory limit over a process tree, its page cache included (cgroup v1 or v2; needs root)."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from types import TracebackType

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_GONE_S = 20.0


class MemoryLimit:
    """A fresh cgroup of `limit_bytes`, removed on exit with whatever still runs in it."""

    def __init__(self, limit_bytes: int) -> None:
        v1 = (V1 / "memory.limit_in_bytes").exists()
        self._peak_name = "memory.max_usage_in_bytes" if v1 else "memory.peak"
        self._path = (V1 if v1 else V2) / f"fomoe-bench-{os.getpid()}-{time.monotonic_ns()}"
        if not v1:
            (V2 / "cgroup.subtree_control").write_text("+memory")
        self._path.mkdir()
        name = "memory.limit_in_bytes" if v1 else "memory.max"
        (self._path / name).write_text(str(limit_bytes))
        if not v1 and (self._path / "memory.swap.max").exists():
            (self._path / "memory.swap.max").write_text("0")

    def enter(self, command: list[str]) -> list[str]:
        """Return `command` with a shell before it that moves itself in first."""
        script = f'echo $$ > {self._path / "cgroup.procs"} && exec "$@"'
        return ["/bin/sh", "-c", script, "sh", *command]

    def peak_bytes(self) -> int:
        """Return the most that was in use at a time, page cache included."""
        return int((self._path / self._peak_name).read_text())

    def held_bytes(self) -> int:
        """Return what is in use now and cannot be dropped: private and shared memory."""
        lines = (self._path / "memory.stat").read_text().splitlines()
        stat = {name: int(value) for name, value in (line.split() for line in lines)}
        if "anon" in stat:
            return stat["anon"] + stat["shmem"]
        return stat["total_rss"] + stat.get("total_shmem", 0)

    def processes(self) -> list[int]:
        """Return the process ids in the group."""
        return [int(line) for line in (self._path / "cgroup.procs").read_text().split()]

    def __enter__(self) -> MemoryLimit:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        deadline = time.monotonic() + _GONE_S
        while left := self.processes():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(left)} processes do not leave {self._path}")
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.1)
        self._path.rmdir()


def drop_caches() -> None:
    """Write back what is dirty and forget the page cache, of the whole machine."""
    os.sync()
    DROP_CACHES.write_text("3")
