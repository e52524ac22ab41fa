"""What actors do when, on one clock: calls of theirs, noted with their beginning and their end.

Children of `pingpong.py --trace N` import this; nothing is noted until `trace` is called.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from fomoe.actors import (
    driver_dense,
    expert_copies,
    layer_calls,
    layer_device,
    layer_host,
    layer_traffic,
)
from fomoe.actors.driver import DriverActor
from fomoe.actors.messages import LAYERS, Do

_MOST = 200_000


class Call(NamedTuple):
    """A call: who, what, nanoseconds of the machine's clock at both ends."""

    who: str
    what: str
    begin_ns: int
    end_ns: int


class Notes:
    """Wraps methods so that their calls are noted."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._calls: deque[Call] = deque(maxlen=_MOST)

    def wrap(self, owner: type, method: str, name: Callable[..., str]) -> None:
        """Note the calls of a method; `name` gets its arguments."""
        plain = getattr(owner, method)

        def noted(*args: Any, **named: Any) -> Any:
            what, begin = name(*args), time.perf_counter_ns()  # arguments change meanwhile
            try:
                return plain(*args, **named)
            finally:
                self._calls.append(Call(self._who, what, begin, time.perf_counter_ns()))

        setattr(owner, method, noted)

    def taken(self) -> list[Call]:
        """Return the calls so far and forget them."""
        calls, self._calls = list(self._calls), deque(maxlen=_MOST)
        return calls


def note_device(who: str) -> Notes:
    """Note what a layer actor does, in this process."""
    notes, server, copies = Notes(who), layer_device.LayerServer, expert_copies.ExpertCopies
    notes.wrap(server, "serve", _message)
    notes.wrap(server, "_begin_hits", lambda *_: "  hits")
    notes.wrap(server, "_bring", lambda *_: "  bring")
    notes.wrap(server, "_await_hidden", lambda *_: "  await hidden")
    notes.wrap(server, "_run", lambda *_: "  run")
    notes.wrap(server, "_run_front", lambda _, layer, do: f"    front {layer}")
    notes.wrap(server, "_finish_computing", lambda *_: "      finish computing")
    notes.wrap(server, "_watch_loads", lambda *_: "  watch loads")
    notes.wrap(server, "_give", lambda *_: "  give")
    notes.wrap(server, "_close", lambda *_: "  close")
    notes.wrap(copies, "order", lambda _, records, step=0: f"order {len(records)} step {step}")
    notes.wrap(copies, "_load", lambda _, job: f"load {_job(job)}")
    notes.wrap(copies, "_end", lambda _, job: f"ended {_job(job)}")
    return notes


def _job(job: Any) -> str:
    return f"{job.record[5]}.{job.record[6]} {'step' if job.step else 'ahead'}"


def _message(server: Any, message: Any) -> str:
    step, _, do, layer, *_ = LAYERS.unpack_from(message)
    asked = [name for name, flag in vars(Do).items() if isinstance(flag, int) and do & flag]
    return f"serve {step} layer {layer} {' '.join(asked)}"


def note_driver() -> Notes:
    """Note what the driver does, in this process."""
    notes, host, calls = Notes("driver"), layer_host.DeviceLayers, layer_calls.LayerCalls
    notes.wrap(host, "open", lambda *_: "open")
    notes.wrap(host, "scores", lambda _, layer: f"scores {layer}")
    notes.wrap(host, "_settle", lambda _, layer: f"  settle {layer}")
    notes.wrap(host, "_go", lambda _, layer, *rest: f"  go {layer}")
    notes.wrap(host, "finish", lambda *_: "finish")
    notes.wrap(host, "largest", lambda *_: "largest")
    notes.wrap(calls, "send", lambda _, link, flags, layer, *rest: f"    send {link.name} {layer}")
    notes.wrap(
        layer_traffic.LayerTraffic,
        "look_ahead",
        lambda _, layer, *rest: f"  look ahead {layer} {rest[1:]}",
    )
    notes.wrap(driver_dense.DriverDense, "_close", lambda *_: "  close with experts' sums")
    for what in ("decide", "decide_by"):
        notes.wrap(host, what, lambda _, layer, *rest: f"decide {layer}")
    return notes


class TracedDriver(DriverActor):
    """A driver that notes what it does."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._notes = note_driver()

    def trace(self) -> list[tuple[str, str, int, int]]:
        """Return the calls since the last time."""
        return [tuple(call) for call in self._notes.taken()]


def lines(calls: list[Call], tokens: int) -> list[str]:
    """Return the calls of the last tokens, in order, in microseconds from the first one on."""
    begins = sorted(c.begin_ns for c in calls if c.who == "driver" and c.what == "open")
    first = begins[-1 - tokens]
    last = begins[-1]
    return [
        f"{(c.begin_ns - first) / 1e3:10.1f} {(c.end_ns - c.begin_ns) / 1e3:8.1f}  "
        f"{c.who:8} {c.what}"
        for c in sorted(calls, key=lambda c: c.begin_ns)
        if first <= c.begin_ns < last
    ]
