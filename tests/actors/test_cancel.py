"""Readers that go away: in the queue, in the prompt, in the answer; threads and event loops."""

import asyncio
import itertools
import threading
import time

import pytest
from support.local_engine import local_engine, slot_bytes
from support.local_model import finished, greedy, tokens_of

from fomoe.engine.requests import Finished, PromptProgress, TokenEvent

pytestmark = pytest.mark.timeout(40)


@pytest.fixture(scope="module")
def engine(model_paths):
    """One engine for all tests of this file, with a fifth of the experts and slow reads."""
    path = model_paths["small"]
    total, _ = slot_bytes(path)
    with local_engine(
        path, vram=total // 4, ram=total // 8, prefill_chunk=8, delay=lambda fetch: 0.0005
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def right(local_models, prompt):
    return tokens_of(local_models["small"].run(greedy(prompt, 8)))


@pytest.fixture(autouse=True)
def next_request_is_right(engine, prompt, right):
    """After every test: nothing runs or waits, and the next request gives the right tokens."""
    yield
    client = engine.client
    assert not client._inboxes
    events = list(client.stream(greedy(prompt, 8, request_id="next")))
    assert tokens_of(events) == right
    driver = engine.handles["driver"].actor
    assert driver._running is None
    assert not driver._queue


class Spy:
    """Counts what the driver sends for each request, whether or not anyone still listens."""

    def __init__(self, client):
        self.seen = []
        self._dispatch = client._dispatch
        client._dispatch = self

    def __call__(self, message):
        self.seen.append(message)
        self._dispatch(message)

    def ends(self, request_id):
        return [m.reason for m in self.seen if isinstance(m, Finished)
                and m.request_id == request_id]  # fmt: skip

    def wait_for_end(self, request_id, seconds=5.0):
        deadline = time.monotonic() + seconds
        while not self.ends(request_id):
            assert time.monotonic() < deadline, f"{request_id} never ended"
            time.sleep(0.002)
        return self.ends(request_id)


@pytest.fixture
def spy(engine, monkeypatch):
    monkeypatch.setattr(engine.client, "_dispatch", engine.client._dispatch)
    return Spy(engine.client)


def close_after(stream, kind, count):
    """Read until the count-th event of a kind, then close as a reader that goes away."""
    seen = 0
    for event in stream:
        seen += isinstance(event, kind)
        if seen == count:
            break
    stream.close()


@pytest.mark.parametrize(("kind", "count"), [(PromptProgress, 1), (PromptProgress, 3),
                                             (TokenEvent, 1), (TokenEvent, 4)])  # fmt: skip
def test_a_reader_that_goes_away_cancels(engine, spy, prompt, kind, count):
    if kind is PromptProgress:  # long enough that the driver is still in it
        prompt = prompt * 40
    close_after(engine.client.stream(greedy(prompt, 2000, request_id="gone")), kind, count)
    assert spy.wait_for_end("gone") == ["cancelled"]
    receipt = next(m for m in spy.seen if isinstance(m, Finished)).receipt
    if kind is PromptProgress:
        assert (receipt.prompt_tokens, receipt.generated_tokens) == (0, 0)
    else:
        assert receipt.prompt_tokens == len(prompt)
        assert receipt.generated_tokens >= count


def test_logits_after_a_cancelled_prompt(engine, spy, prompt):
    close_after(engine.client.stream(greedy(prompt * 40, 9, request_id="gone")), PromptProgress, 1)
    assert spy.wait_for_end("gone") == ["cancelled"]
    assert engine.client.logits(prompt, 300).shape == (len(prompt), 300)


def test_an_async_reader_that_goes_away_cancels(engine, spy, prompt):
    async def read(count):
        stream = engine.client.generate(greedy(prompt, 4000, request_id="async"))
        events = []
        async for event in stream:
            events.append(event)
            if len(tokens_of(events)) == count:
                break
        await stream.aclose()
        return events

    events = asyncio.run(read(3))
    assert len(tokens_of(events)) == 3
    assert spy.wait_for_end("async") == ["cancelled"]


async def consume(engine, request):
    return [event async for event in engine.client.generate(request)]


def test_cancelled_in_the_queue(engine, spy, prompt, right):
    async def run():
        long = asyncio.create_task(consume(engine, greedy(prompt, 4000, request_id="long")))
        waiting = []
        for number in range(3):
            await asyncio.sleep(0.02)
            request = greedy(prompt, 8, request_id=f"w{number}")
            waiting.append(asyncio.create_task(consume(engine, request)))
        await asyncio.sleep(0.02)
        waiting[1].cancel()
        await asyncio.to_thread(spy.wait_for_end, "w1")
        assert not spy.ends("long")  # it still runs: w1 ended in the queue
        long.cancel()
        return await asyncio.gather(long, *waiting, return_exceptions=True)

    long, first, second, third = asyncio.run(run())
    assert isinstance(long, asyncio.CancelledError)
    assert isinstance(second, asyncio.CancelledError)
    for events in (first, third):
        assert finished(events).reason == "length"
        assert tokens_of(events) == right
    assert spy.wait_for_end("long") == ["cancelled"]
    assert spy.ends("w1") == ["cancelled"]
    end = next(m for m in spy.seen if isinstance(m, Finished) and m.request_id == "w1")
    assert (end.receipt.prompt_tokens, end.receipt.generated_tokens) == (0, 0)
    kinds = {type(m) for m in spy.seen if getattr(m, "request_id", None) == "w1"}
    assert kinds == {Finished}


def test_many_requests_take_turns_in_order(engine, prompt, right):
    done, lock = [], threading.Lock()

    def one(name):
        events = list(engine.client.stream(greedy(prompt, 8, request_id=name)))
        with lock:
            done.append((name, tokens_of(events), finished(events).reason))

    hold = engine.client.stream(greedy(prompt, 4000, request_id="hold"))
    next(hold)
    threads = []
    for number in range(6):
        threads.append(threading.Thread(target=one, args=(f"r{number}",)))
        threads[-1].start()
        while f"r{number}" not in engine.client._inboxes:
            time.sleep(0.001)
    hold.close()
    for thread in threads:
        thread.join(20)
    assert done == [(f"r{number}", right, "length") for number in range(6)]


def test_a_finished_stream_is_not_cancelled(engine, spy, prompt):
    events = list(engine.client.stream(greedy(prompt, 2, request_id="done")))
    assert finished(events).reason == "length"
    list(engine.client.stream(greedy(prompt, 1, request_id="after")))
    assert spy.ends("done") == ["length"]
    assert not any(getattr(m, "reason", None) == "cancelled" for m in spy.seen)


def test_cancel_at_any_moment(engine, spy, prompt):
    """Closed after every number of events there is: one end each, never two."""
    for number in itertools.count(1):
        stream = engine.client.stream(greedy(prompt, 4, request_id=f"n{number}"))
        events = [event for event, _ in zip(stream, range(number), strict=False)]
        stream.close()
        assert len(spy.wait_for_end(f"n{number}")) == 1
        if isinstance(events[-1], Finished):
            break
    # Four prompt chunks, four tokens, the end; more where a chunk takes long and says so.
    assert number >= 4 + 4 + 1
    time.sleep(0.05)
    assert all(len(spy.ends(f"n{i}")) == 1 for i in range(1, number + 1))
