"""Keeps an engine up: when an actor dies, requests end in an error and all actors start again.

A half-finished token is never resumed: the fabric in which a process died is left, the survivors
are ended, and a new set of actors fills its tiers from the files.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace

from fomoe.actors.client import Answer
from fomoe.actors.launch import RunningEngine
from fomoe.actors.messages import LogitsRequest
from fomoe.actors.process import log
from fomoe.engine.plan import EnginePlan
from fomoe.engine.requests import EngineStatus, Event, GenerateRequest
from fomoe.errors import ClusterLostError
from fomoe.model.buffers import F32

_WATCH_S = 0.1
_PAUSE_S = 1.0  # after a start that failed
_MOST_RESTARTS = 3
_WITHIN_S = 300.0
_KINDS = ("driver", "gpu", "storage")  # of actors, as `fomoe_actor_restarts_total` has them


class Supervisor:
    """An engine that outlives its actors; implements `Engine`.

    `start` brings a new set of actors up. Its status is "degraded" meanwhile. More than three
    restarts in five minutes, or a cluster that has ended, mean that starting again does not help:
    the status is then "stopped" for good, and says why.
    """

    def __init__(self, start: Callable[[], RunningEngine]) -> None:
        self._start = start
        self._engine = start()
        self._restarts: deque[float] = deque(maxlen=_MOST_RESTARTS)
        self._restarts_of: Counter[str] = Counter()
        self._down: EngineStatus | None = None
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="fomoe-supervisor", daemon=True)
        self._watcher.start()

    @property
    def restarts(self) -> int:
        """How often all actors were started again, or tried to be."""
        return self._restarts_of.total()

    @property
    def ctx_size(self) -> int:
        """Tokens that one sequence may hold (prompt and answer together)."""
        return self._engine.client.ctx_size

    @property
    def running(self) -> RunningEngine:
        """The present set of actors."""
        return self._engine

    @property
    def plan(self) -> EnginePlan:
        """What the budgets hold; the same after every restart."""
        return self._engine.plan

    def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """Yield the request's events; closing the iterator early cancels the request."""
        return self._engine.client.generate(request)

    def cancel(self, request_id: str) -> None:
        """Ask for the end of a request; its events go on to their `Finished`."""
        self._engine.client.cancel(request_id)

    def stream(self, request: GenerateRequest | LogitsRequest) -> Iterator[Answer]:
        """Yield the request's events in the calling thread; closing early cancels."""
        return self._engine.client.stream(request)

    def logits(self, tokens: list[int], vocab: int) -> F32:
        """Return the logits float32 [T, V] of a sequence; EngineError where it failed."""
        return self._engine.client.logits(tokens, vocab)

    def status(self) -> EngineStatus:
        """Return the newest status without blocking."""
        status = self._down or self._engine.client.status()
        restarts = {
            f'fomoe_actor_restarts_total{{actor="{kind}"}}': float(self._restarts_of[kind])
            for kind in _KINDS
        }
        return replace(status, counters=status.counters | restarts)

    def close(self) -> None:
        """Stop supervising, then the actors; bounded."""
        self._closing.set()
        self._watcher.join(10.0)
        self._engine.stop()

    def _watch(self) -> None:
        while not self._closing.wait(_WATCH_S):
            status = self._engine.client.status()
            if status.state == "degraded" and self._down is None:
                self._restart(status.detail)

    def _restart(self, reason: str) -> None:
        """Start until it works; a start that fails counts as a restart that did not help."""
        kind = next((kind for kind in _KINDS if reason.startswith(kind)), _KINDS[0])
        said = "" if "started again" in reason else "; the engine starts again"
        self._down = EngineStatus(state="degraded", detail=reason + said)
        self._engine.stop()
        while not self._closing.is_set():
            now = time.monotonic()
            if len(self._restarts) == _MOST_RESTARTS and now - self._restarts[0] < _WITHIN_S:
                self._give_up(
                    f"{reason}; {_MOST_RESTARTS} restarts in {_WITHIN_S:.0f} s did not help: "
                    "see the actors' logs, then start fomoe again"
                )
                return
            self._restarts.append(now)
            self._restarts_of[kind] += 1
            log.error("starting all actors again: %s", reason)
            try:
                self._engine = self._start()
            except ClusterLostError as error:
                self._give_up(str(error))
                return
            except Exception as error:  # whatever it is: nobody else watches the engine
                log.error("could not start again: %s", error)
                reason = str(error)
                self._closing.wait(_PAUSE_S)
                continue
            self._down = None
            log.error("ready again after %.1f s", time.monotonic() - now)
            if self._closing.is_set():  # `close` did not wait that long
                self._engine.stop()
            return

    def _give_up(self, why: str) -> None:
        self._down = EngineStatus(state="stopped", detail=why)
        log.error("%s", why)
