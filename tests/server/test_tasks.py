from __future__ import annotations

import asyncio
import contextlib

from fomoe.server.tasks import end_tasks, in_this_task


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


def test_last_words_have_a_bound_and_may_be_cancelled() -> None:
    async def main() -> None:
        said = []

        async def say(wait_s: float) -> None:
            said.append(wait_s)
            await asyncio.sleep(wait_s)
            said.append(-wait_s)

        await asyncio.wait_for(in_this_task(say(60), 0.01), 10)
        await in_this_task(say(0), 10)
        speaking = asyncio.create_task(in_this_task(say(50), 60))
        await asyncio.sleep(0)
        speaking.cancel()
        await asyncio.wait_for(speaking, 10)
        assert said == [60, 0, 0, 50]

    asyncio.run(main())
