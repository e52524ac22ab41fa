"""Runs the generations of one HTTP request and merges their events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from types import TracebackType
from typing import Protocol, runtime_checkable

from fomoe.engine.requests import Engine, Event, Finished, GenerateRequest
from fomoe.errors import EngineError
from fomoe.server.tasks import end_tasks

WIDTH = 4  # generations of one HTTP request that the engine is given at a time
BUFFERED = 64  # events that wait for a slow client before the generation does


@runtime_checkable
class CancelsById(Protocol):
    """An engine that ends a request early and still reports what it cost.

    After `cancel` the request's iterator yields `Finished` with reason `cancelled`.
    """

    def cancel(self, request_id: str) -> None:
        """End the request soon; does nothing when it has ended."""


class Fanout:
    """The merged events of several generations; leaving the context cancels what still runs."""

    def __init__(self, engine: Engine, requests: Sequence[GenerateRequest]) -> None:
        self._engine = engine
        self._requests = requests
        self._queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue(BUFFERED)
        self._gate = asyncio.Semaphore(WIDTH)
        self._pumps: list[asyncio.Task[None]] = []
        self._getting: asyncio.Task[tuple[int, Event | Exception]] | None = None

    async def __aenter__(self) -> Fanout:
        self._pumps = [
            asyncio.create_task(self._pump(index, request))
            for index, request in enumerate(self._requests)
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        getting = [] if self._getting is None else [self._getting]
        await end_tasks([*self._pumps, *getting])

    async def next(self, timeout_s: float) -> tuple[int, Event] | None:
        """Return the next (number of the request, event), None when none comes in time.

        Raises:
            Exception: what a generation raised.
        """
        if self._getting is None:
            self._getting = asyncio.create_task(self._queue.get())
        done, _ = await asyncio.wait({self._getting}, timeout=timeout_s)
        if not done:
            return None
        index, event = self._getting.result()
        self._getting = None
        if isinstance(event, Exception):
            raise event
        return index, event

    def stop(self, index: int) -> bool:
        """End one generation early; returns whether its `Finished` event will still come."""
        if isinstance(self._engine, CancelsById):
            self._engine.cancel(self._requests[index].request_id)
            return True
        self._pumps[index].cancel()
        return False

    async def _pump(self, index: int, request: GenerateRequest) -> None:
        async with self._gate:
            try:
                events = self._engine.generate(request)
                try:
                    await self._forward(index, events)
                finally:
                    if isinstance(events, AsyncGenerator):
                        await events.aclose()
            except Exception as error:
                await self._queue.put((index, error))

    async def _forward(self, index: int, events: AsyncIterator[Event]) -> None:
        async for event in events:
            await self._queue.put((index, event))
            if isinstance(event, Finished):
                return
        raise EngineError("the engine ended the answer without saying why")
