"""Resources that serve one job after the other, for many independent runs (lanes) at once.

A lane is one token of one setting. All lanes go through the same program, so the simulation is a
chain of array operations; jobs that a lane does not have are masked out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.sim.machine import Drive

F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Seconds = float | F64


@dataclass(frozen=True, slots=True, eq=False)
class Landing:
    """When an expert's bytes are there, float64 [lanes], and in which lanes, bool [lanes]."""

    at: F64
    which: Mask


class Server:
    """First come, first served: a job starts when it is ready and the one before has ended.

    Attributes:
        free: float64 [lanes], when the last job of each lane ends.
        busy: float64 [lanes], the sum of service times.
    """

    def __init__(self, lanes: int) -> None:
        self.free = np.zeros(lanes)
        self.busy = np.zeros(lanes)

    def serve(self, ready: F64, seconds: Seconds, which: Mask | None = None) -> F64:
        """Serve a job per lane; returns when it ends, `ready` in lanes that have none.

        A job of no time passes at once: it waits for nobody.
        """
        if isinstance(seconds, float):
            if seconds <= 0:
                return ready
            end = np.maximum(ready, self.free) + seconds
            if which is None:
                self.free = end
                self.busy += seconds
                return end
        else:
            end = np.maximum(ready, self.free) + seconds
            which = seconds > 0 if which is None else which & (seconds > 0)
        self.free = np.where(which, end, self.free)
        self.busy += which * seconds
        return np.where(which, end, ready)


class Drives:
    """The drives of a node: a read goes to the one that would end it first, the first at a tie.

    Args:
        lanes: how many.
        kinds: rate, latency and request time of each drive.
    """

    def __init__(self, lanes: int, kinds: Sequence[Drive]) -> None:
        self._kinds = tuple(kinds)
        self._servers = [Server(lanes) for _ in kinds]
        self.bytes = np.zeros(lanes)

    @property
    def busy(self) -> F64:
        """Service times over all drives, float64 [lanes]."""
        total: F64 = np.sum([server.busy for server in self._servers], axis=0)
        return total

    @property
    def share(self) -> F64:
        """Mean service time over the drives that are there, float64 [lanes]."""
        return self.busy / len(self._servers)

    def least_s(self, nbytes: float, pieces: int) -> float:
        """Return the seconds that the fastest drive is at work on a read."""
        return min(nbytes / kind.rate + pieces * kind.request_s for kind in self._kinds)

    def next_start(self, ready: F64) -> F64:
        """Return when a read that is ready then would begin."""
        starts = [np.maximum(ready, server.free) for server in self._servers]
        first: F64 = np.minimum.reduce(starts)
        return first

    def read(self, ready: F64, nbytes: float, pieces: int, which: Mask) -> F64:
        """Read `nbytes` in `pieces` requests; returns when the last one has landed."""
        costs = [nbytes / kind.rate + pieces * kind.request_s for kind in self._kinds]
        if len(costs) == 1:
            self.bytes += which * nbytes
            ended = self._servers[0].serve(ready, costs[0], which)
            return np.where(which, ended + self._kinds[0].latency_s, ready)
        ends = [
            np.maximum(ready, server.free) + cost
            for server, cost in zip(self._servers, costs, strict=True)
        ]
        best = np.argmin(ends, axis=0)
        landed = ready
        for number, (server, cost) in enumerate(zip(self._servers, costs, strict=True)):
            mine = which & (best == number)
            late = self._kinds[number].latency_s
            landed = np.where(mine, server.serve(ready, cost, mine) + late, landed)
        self.bytes += which * nbytes
        return landed
