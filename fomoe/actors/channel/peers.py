"""Notices within milliseconds that another process of this box is gone."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from fomoe.actors.channel._channel import ALIVE, Plane

# While a peer has still to attach (or has no pidfd), the process table is looked through this
# often; afterwards the thread sleeps until a pidfd reports an end.
SCAN_MS = 20


def boot_id() -> str:
    """Identity of this boot of this kernel; equal in all containers of a box."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def starttime(pid: int) -> int | None:
    """Start of a process in clock ticks since boot, None when it is gone (proc(5), field 22).

    A zombie counts as gone: it will never send or read again.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command in parentheses may hold anything, so fields are counted after the last ")".
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


class PeerWatcher:
    """A daemon thread that holds a pidfd of every attached peer and reports those that end.

    `rows` are the rows of the process table to watch; a peer that attaches later is found there.
    `on_death(row)` runs in the thread.
    """

    def __init__(self, plane: Plane, rows: Iterable[int], on_death: Callable[[int], None]) -> None:
        self._plane = plane
        self._on_death = on_death
        self._unseen = set(rows)
        self._pidfds: dict[int, int] = {}  # pidfd -> row
        self._polled: dict[int, tuple[int, int]] = {}  # row -> (pid, starttime): no pidfd for it
        self._poll = select.poll()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll.register(self._stop, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="fomoe-peers", daemon=True)

    def start(self) -> None:
        """Begins to watch; peers that are attached already are under watch on return."""
        self._scan()
        self._thread.start()

    def ignore(self, rows: Iterable[int]) -> None:
        """Stops looking for peers that will never attach here because they are on another box."""
        self._unseen.difference_update(rows)

    def stop(self) -> None:
        """Ends the thread; not to be called from `on_death`."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        for fd in (*self._pidfds, self._stop):
            os.close(fd)
        self._pidfds.clear()

    def _run(self) -> None:
        while True:
            timeout = SCAN_MS if self._unseen or self._polled else None
            for fd, _ in self._poll.poll(timeout):
                if fd == self._stop:
                    return
                self._poll.unregister(fd)
                row = self._pidfds.pop(fd)
                os.close(fd)
                self._on_death(row)
            self._scan()

    def _scan(self) -> None:
        for row in tuple(self._unseen):
            state, pid, started = self._plane.describe(row)
            if state < ALIVE:
                continue
            self._unseen.discard(row)
            if state == ALIVE:
                self._watch(row, pid, started)
        for row, (pid, started) in tuple(self._polled.items()):
            if starttime(pid) != started:
                del self._polled[row]
                self._on_death(row)

    def _watch(self, row: int, pid: int, started: int) -> None:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._on_death(row)
            return
        except OSError:  # a sandbox without pidfd, or no file descriptor left
            self._polled[row] = (pid, started)
            return
        # After the open, so that the pidfd is known to be of the process that was meant.
        if starttime(pid) != started:
            os.close(fd)
            self._on_death(row)
            return
        self._pidfds[fd] = row
        self._poll.register(fd, select.POLLIN)
