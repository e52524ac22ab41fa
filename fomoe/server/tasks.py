"""Ends asyncio tasks for certain, and says last words while they end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from typing import Any

_AGAIN_S = 0.1


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until all have ended; what they raise is dropped.

    A cancellation is repeated until it works: `asyncio.wait_for` of Python 3.10 and 3.11 forgets
    one that arrives just when what it waits for is done.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=_AGAIN_S)
        for task in done:
            if not task.cancelled():
                task.exception()


async def in_this_task(work: Coroutine[Any, Any, None], timeout_s: float) -> None:
    """Await work for a while; a cancellation, too, ends it quietly.

    An event loop that closes cancels all tasks, a new one before its first step. Work that need not
    wait for anything gets done here all the same.
    """
    task = asyncio.current_task()
    assert task is not None
    timer = asyncio.get_running_loop().call_later(timeout_s, task.cancel)
    try:
        with suppress(asyncio.CancelledError):
            await work
    finally:
        timer.cancel()
