"""Where the wall time of a pass through the layers goes, measured by the thread that runs it."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum
from operator import add


class Lap(IntEnum):
    """What the loop's thread did between two readings of the clock.

    DENSE is attention, router and shared expert; BRAIN routing, plans and messages to actors;
    AWAIT the time until a device has answered, of which the device says how long it computed and
    how long it waited for bytes.
    """

    DENSE = 0
    BRAIN = 1
    AWAIT = 2


class Stopwatch:
    """Adds the time since the last reading to a lap's total, in nanoseconds."""

    __slots__ = ("_last", "ns")

    def __init__(self) -> None:
        self.ns = [0] * len(Lap)
        self._last = 0

    def start(self) -> None:
        """Forget the time until now."""
        self._last = time.perf_counter_ns()

    def lap(self, what: Lap) -> None:
        """Charge the time since the last reading to `what`."""
        now = time.perf_counter_ns()
        self.ns[what] += now - self._last
        self._last = now


# What a token's wall time is made of: the loop thread's own arithmetic, the devices' arithmetic on
# experts, decisions, messages between processes, waiting for the drive, and everything else
# (sampling, events, Python between them). Nothing is copied between tiers of a `cpu` device.
PARTS = ("dense", "experts", "brain", "channel", "disk", "rest")
NOTHING = (0.0,) * len(PARTS)

Seconds = tuple[float, ...]


class Waterfall:
    """Splits wall time into `PARTS`; each reading covers the time since the one before."""

    def __init__(self, watch: Stopwatch, clock: Callable[[], float]) -> None:
        self._watch = watch
        self._clock = clock
        self._seen = [0] * len(Lap)
        self._compute_s = self._disk_s = self._at = 0.0

    def read(self, compute_s: float, disk_s: float) -> Seconds:
        """Return seconds by part, given the running totals that the devices report.

        The parts add up to the wall time, unless two devices worked at the same time.
        """
        now, laps = self._clock(), self._watch.ns
        dense, brain, awaited = ((a - b) / 1e9 for a, b in zip(laps, self._seen, strict=True))
        experts, disk = compute_s - self._compute_s, disk_s - self._disk_s
        wall = now - self._at
        self._seen[:] = laps
        self._compute_s, self._disk_s, self._at = compute_s, disk_s, now
        channel = max(0.0, awaited - experts - disk)
        return (dense, experts, brain, channel, disk, wall - dense - brain - awaited)


def added(one: Seconds, other: Seconds) -> Seconds:
    """Return the sums part by part."""
    return tuple(map(add, one, other))


def milliseconds(parts: Seconds) -> dict[str, float]:
    """Return milliseconds by the parts' names."""
    return {name: 1e3 * value for name, value in zip(PARTS, parts, strict=True)}
