"""The client's end of the ring: whatever the driver does or a caller sends, no reader hangs."""

import asyncio
import threading
import time

import numpy as np
import pytest
from support.local_engine import local_engine
from support.local_model import finished, greedy, tokens_of

from fomoe.actors import client as client_module
from fomoe.actors.messages import StatusRequest
from fomoe.engine.requests import EngineStatus, Finished
from fomoe.errors import EngineError, RequestError

pytestmark = pytest.mark.timeout(40)


@pytest.fixture
def engine(model_paths, monkeypatch):
    monkeypatch.setattr(client_module, "_STATUS_PERIOD_S", 0.001)
    with local_engine(model_paths["small"], vram=1 << 30, ram=0, prefill_chunk=16) as engine:
        yield engine


@pytest.fixture
def right(local_models, prompt):
    return tokens_of(local_models["small"].run(greedy(prompt, 6)))


@pytest.fixture
def busy(engine):
    """Keeps the driver inside one step until it is told otherwise."""
    model = engine.handles["driver"].actor._forward.model
    embed, inside, go_on = model.embed, threading.Event(), threading.Event()

    def slow(batch):
        inside.set()
        assert go_on.wait(20)
        return embed(batch)

    model.embed = slow
    request = greedy([1], 1, request_id="busy")
    thread = threading.Thread(target=lambda: list(engine.client.stream(request)))
    thread.start()
    assert inside.wait(5)
    yield go_on
    go_on.set()
    thread.join(5)
    model.embed = embed


def test_a_busy_driver_is_asked_for_its_status_once(engine, busy, monkeypatch, wait_for):
    """A load or a prompt chunk may take minutes: questions must not fill the ring."""
    encode, asked = client_module.encode, []

    def count(message):
        if isinstance(message, StatusRequest):
            asked.append(message)
        return encode(message)

    monkeypatch.setattr(client_module, "encode", count)
    time.sleep(0.3)
    assert len(asked) <= 1
    busy.set()
    wait_for(lambda: len(asked) >= 4)  # it is asked again once it has answered


def test_more_than_the_ring_holds_waits_for_the_driver(engine, busy, right, prompt):
    """Requests longer than all free slots together, while nobody takes them."""
    engine.client._port._bound_s = 0.1  # a send that waited would give the engine up
    big = 64 * engine.client.fabric.spec.slot_bytes
    results = {}

    def read(name, request):
        results[name] = list(engine.client.stream(request))

    requests = {f"b{i}": greedy([5] * (big // 3), 1, request_id=f"b{i}") for i in range(6)}
    requests["good"] = greedy(prompt, 6, request_id="good")
    threads = [threading.Thread(target=read, args=item) for item in requests.items()]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert engine.client.status().state == "ready"
    assert len(engine.client._outgoing) > 1  # the ring is full
    busy.set()
    for thread in threads:
        thread.join(20)
    assert tokens_of(results.pop("good")) == right
    for events in results.values():
        assert "context holds 4,096" in finished(events).error
    assert engine.client.status().state == "ready"


@pytest.mark.parametrize("prompt", [
    [np.int64(3), 4], [1.5, object()], [2**70]
], ids=["numpy", "object", "too large"])  # fmt: skip
def test_a_request_that_cannot_be_sent_is_refused_to_its_caller(engine, prompt):
    with pytest.raises(RequestError, match="cannot be sent"):
        next(engine.client.stream(greedy(prompt, 1, request_id="bad")))
    assert not engine.client._inboxes
    list(engine.client.stream(greedy([1], 1, request_id="bad")))


def test_an_id_in_use_is_refused(engine):
    first = engine.client.stream(greedy([1] * 40, 4000, request_id="twice"))
    next(first)
    with pytest.raises(EngineError, match="twice is open"):
        next(engine.client.stream(greedy([1], 1, request_id="twice")))
    assert next(first).processed == 32  # the first one goes on
    first.close()


def test_whatever_ends_the_pump_ends_every_reader(engine, busy, monkeypatch):
    """Even a mistake of fomoe itself: a reader must not wait for ever."""
    events = []
    reader = threading.Thread(
        target=lambda: events.extend(engine.client.stream(greedy([1], 1, request_id="r")))
    )
    reader.start()
    time.sleep(0.05)

    def mistake(message):
        raise KeyError("a mistake")

    monkeypatch.setattr(engine.client, "_dispatch", mistake)
    busy.set()
    reader.join(5)
    assert not reader.is_alive()
    assert [type(e) for e in events] == [Finished]
    assert "a mistake" in events[0].error
    assert engine.client.status().state == "degraded"


def test_a_status_from_outside_does_not_cover_a_failure_up(engine):
    engine.client._fail("lost")
    engine.client.report(EngineStatus(state="ready"))
    assert engine.client.status() == EngineStatus(state="degraded", detail="lost")


def test_logits_of_a_sequence_longer_than_the_ring(engine, local_models):
    tokens = list(range(300)) * 3  # 900 rows of 300 floats in 4 messages of several parts
    got = engine.client.logits(tokens, 300)
    assert got.shape == (900, 300)
    assert np.isfinite(got).all()
    assert np.array_equal(got[:300], engine.client.logits(tokens[:300], 300))


def test_threads_and_event_loops_side_by_side(engine, prompt, right):
    results = {}

    def read(name):
        results[name] = tokens_of(list(engine.client.stream(greedy(prompt, 6, request_id=name))))

    async def gather():
        async def one(name):
            request = greedy(prompt, 6, request_id=name)
            return tokens_of([event async for event in engine.client.generate(request)])

        return await asyncio.gather(*(one(f"a{i}") for i in range(4)))

    threads = [threading.Thread(target=read, args=(f"t{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    got = asyncio.run(gather())
    for thread in threads:
        thread.join(10)
    assert got == [right] * 4
    assert results == {f"t{i}": right for i in range(4)}


def test_an_event_loop_that_is_gone_does_not_disturb_the_others(engine, prompt, right, busy):
    async def leave():
        stream = engine.client.generate(greedy([1, 2], 4, request_id="left"))
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.05)
        task.cancel()
        return stream

    asyncio.run(leave())
    busy.set()
    events = list(engine.client.stream(greedy(prompt, 6, request_id="stays")))
    assert tokens_of(events) == right
