"""How much of the machine others used while an engine ran: a timing with company is no timing."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil


class Others:
    """Cores that processes outside a tree (or the hypervisor) kept busy since this was made."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._start = time.monotonic()
        self._busy = _machine_seconds()
        self._own = _tree_seconds(root)

    def cores(self) -> float:
        """Return the average number of cores that others used."""
        seconds = time.monotonic() - self._start
        busy = _machine_seconds() - self._busy
        own = _tree_seconds(self._root) - self._own
        return round(max(0.0, (busy - own) / max(seconds, 1e-3)), 2)


def _machine_seconds() -> float:
    """Processor seconds that were not idle since boot, stolen ones included."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _tree_seconds(root: int) -> float:
    """Processor seconds of a process and its descendants."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(root)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
    return total
