from __future__ import annotations

import asyncio
import contextlib

from fomoe.server.tasks import end_tasks


def test_a_task_that_forgets_a_cancellation_is_ended_all_the_same() -> None:
    async def forgetful(cancellations: int) -> int:
        for _ in range(cancellations):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
        return cancellations

    async def failing() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ValueError

    async def main() -> None:
        tasks = [asyncio.create_task(forgetful(n)) for n in range(3)]
        tasks += [asyncio.create_task(failing())]
        await asyncio.sleep(0)
        await asyncio.wait_for(end_tasks(tasks), 10)
        assert all(task.done() for task in tasks)
        await end_tasks([])

    asyncio.run(main())
