"""The fetch queue: order, priority, one job per slot, errors, and an end in bounded time."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
from expert_files import EXPERTS, LAYERS, Model
from fetch_bench import Bench, wait_until

from fomoe.errors import StorageError
from fomoe.storage.fetch import DEMAND, PREFETCH, Fetch, FetchQueue
from fomoe.storage.reader import _pread
from fomoe.storage.segment import Segment


def test_experts_arrive(bench: Bench) -> None:
    with bench.queue(threads=4) as queue:
        fetches = [bench.fetch(slot, slot % LAYERS, slot % EXPERTS) for slot in range(12)]
        assert queue.submit(fetches) == ()
        assert queue.drain(10)
    assert sorted(fetch.slot for fetch, _ in bench.landed) == list(range(12))
    for fetch, error in bench.landed:
        assert error is None
        assert bench.model.in_slot(fetch.layer, fetch.expert, bench.slot(fetch.slot))
    assert queue.counters.jobs == [12, 0]
    table = bench.model.table
    assert queue.counters.nbytes == [sum(table.expert_bytes(each.layer) for each in fetches), 0]
    assert queue.counters.busy_s[DEMAND] > 0


def test_a_copy_inside_the_segment(bench: Bench) -> None:
    with bench.queue(threads=2) as queue:
        # the copy waits for the read of its source, the next read for the copy
        queue.submit(
            [
                bench.fetch(1, 2, 7),
                bench.fetch(2, 2, 7, source=1, priority=PREFETCH),
                bench.fetch(1, 0, 1),
            ]
        )
        assert queue.drain(10)
    assert bench.model.in_slot(2, 7, bench.slot(2))
    assert bench.model.in_slot(0, 1, bench.slot(1))
    assert queue.counters.jobs == [2, 1]


def test_demand_overtakes_prefetch(bench: Bench) -> None:
    bench.gate.clear()
    with bench.queue() as queue:
        queue.submit([bench.fetch(0)])
        wait_until(lambda: len(bench.started) == 1)
        queue.submit([bench.fetch(slot, priority=PREFETCH) for slot in (1, 2)])
        queue.submit([bench.fetch(slot) for slot in (3, 4)])
        bench.gate.set()
        assert queue.drain(10)
    assert [fetch.slot for fetch in bench.started] == [0, 3, 4, 1, 2]


@pytest.mark.parametrize(("threads", "most"), [(2, 1), (4, 2)])
def test_few_threads_read_prefetches(bench: Bench, threads: int, most: int) -> None:
    bench.gate.clear()
    with bench.queue(threads) as queue:
        queue.submit([bench.fetch(slot, priority=PREFETCH) for slot in range(5)])
        wait_until(lambda: len(bench.started) == most)
        queue.submit([bench.fetch(6)])
        wait_until(lambda: len(bench.started) == most + 1)
        assert bench.started[most].slot == 6
        bench.gate.set()
        assert queue.drain(10)
    assert len(bench.landed) == 6


def test_a_prefetch_waits_for_a_demand_under_way(bench: Bench) -> None:
    bench.gate.clear()
    with bench.queue(threads=4) as queue:
        queue.submit([bench.fetch(0)])
        wait_until(lambda: len(bench.started) == 1)
        queue.submit([bench.fetch(1, priority=PREFETCH)])
        time.sleep(0.02)
        assert len(bench.started) == 1
        bench.gate.set()
        assert queue.drain(10)
    assert [fetch.slot for fetch, _ in bench.landed] == [0, 1]


def test_a_job_that_frees_two_slots_wakes_two_threads(bench: Bench) -> None:
    gates = {slot: threading.Event() for slot in range(4)}

    def hold(fetch: Fetch) -> float:
        bench.started.append(fetch)
        assert gates[fetch.slot].wait(30)
        return 0.0

    queue = FetchQueue(bench.reader, bench.segment, bench.land, 3, hold)
    queue.submit([bench.fetch(0, source=1)])
    wait_until(lambda: len(bench.started) == 1)
    # both wait for the copy, on its target and on its source, and for nothing else
    queue.submit([bench.fetch(2, source=0), bench.fetch(3, source=1)])
    time.sleep(0.02)
    assert len(bench.started) == 1
    gates[0].set()
    wait_until(lambda: len(bench.started) == 3)
    gates[2].set()
    gates[3].set()
    assert queue.drain(10)
    assert queue.close()


def test_a_newer_job_drops_the_queued_prefetch_of_its_slot(bench: Bench) -> None:
    bench.gate.clear()
    with bench.queue() as queue:
        queue.submit([bench.fetch(0)])
        wait_until(lambda: len(bench.started) == 1)
        stale = bench.fetch(1, 0, 1, priority=PREFETCH)
        assert queue.submit([stale]) == ()
        newer = bench.fetch(1, 0, 2, priority=PREFETCH)
        assert queue.submit([newer]) == (stale,)
        newest = bench.fetch(1, 0, 3)
        assert queue.submit([newest]) == (newer,)
        bench.gate.set()
        assert queue.drain(10)
    assert [fetch for fetch, _ in bench.landed][1:] == [newest]
    assert bench.model.in_slot(0, 3, bench.slot(1))
    assert queue.counters.dropped == 2


def test_a_running_prefetch_lands_before_the_demand_on_its_slot(bench: Bench) -> None:
    bench.gate.clear()
    with bench.queue(threads=4) as queue:
        queue.submit([bench.fetch(1, 0, 1, priority=PREFETCH)])
        wait_until(lambda: len(bench.started) == 1)
        assert queue.submit([bench.fetch(1, 0, 2)]) == ()
        time.sleep(0.02)
        assert len(bench.started) == 1
        bench.gate.set()
        assert queue.drain(10)
    assert [fetch.expert for fetch, _ in bench.landed] == [1, 2]
    assert bench.model.in_slot(0, 2, bench.slot(1))


def test_cancel_prefetch(bench: Bench) -> None:
    bench.gate.clear()
    with bench.queue() as queue:
        first = bench.fetch(0, priority=PREFETCH)
        queue.submit([first])
        wait_until(lambda: len(bench.started) == 1)
        queued = [bench.fetch(slot, priority=PREFETCH) for slot in (1, 2)]
        demand = bench.fetch(3)
        queue.submit([*queued, demand])
        assert queue.cancel_prefetch() == tuple(queued)
        assert queue.cancel_prefetch() == ()
        bench.gate.set()
        assert queue.drain(10)
    assert [fetch for fetch, _ in bench.landed] == [first, demand]


def test_cancel_prefetch_of_a_layer(bench: Bench) -> None:
    bench.gate.clear()
    with bench.queue() as queue:
        queue.submit([bench.fetch(0)])
        wait_until(lambda: len(bench.started) == 1)
        queued = [bench.fetch(slot, layer=slot % 2, priority=PREFETCH) for slot in (1, 2, 3)]
        queue.submit(queued)
        assert queue.cancel_prefetch(1) == (queued[0], queued[2])
        bench.gate.set()
        assert queue.drain(10)
    assert queued[1] in [fetch for fetch, _ in bench.landed]
    assert len(bench.landed) == 2


def test_background_reads_are_not_forgotten(bench: Bench) -> None:
    bench.gate.clear()
    with bench.queue() as queue:
        queue.submit([bench.fetch(0)])
        wait_until(lambda: len(bench.started) == 1)
        guess, background = (bench.fetch(s, priority=PREFETCH, keep=s == 2) for s in (1, 2))
        queue.submit([guess, background])
        assert queue.cancel_prefetch() == (guess,)
        bench.gate.set()
        assert queue.drain(10)
    assert [fetch for fetch, _ in bench.landed][1:] == [background]


def test_prefetches_that_demand_meets_are_counted(bench: Bench) -> None:
    bench.gate.clear()
    with bench.queue() as queue:
        begun, queued = (bench.fetch(slot, priority=PREFETCH) for slot in (0, 1))
        queue.submit([begun])
        wait_until(lambda: len(bench.started) == 1)
        queue.submit([queued])
        queue.submit([replace(fetch, priority=DEMAND) for fetch in (begun, queued)])
        assert queue.counters.met == [1, 1, 0]
        bench.gate.set()
        assert queue.drain(10)


def test_a_failed_read_fails_alone(bench: Bench) -> None:
    extent = bench.model.table.extents(2, 5)[0]
    shard = bench.model.file.shards[extent.shard]
    with bench.queue(threads=2) as queue:
        with shard.open("r+b") as file:
            file.truncate(extent.offset)
        queue.submit([bench.fetch(0, 2, 5), bench.fetch(1, 0, 0)])
        assert queue.drain(10)
    outcome = {fetch.slot: error for fetch, error in bench.landed}
    assert outcome[1] is None
    assert "blk.2.ffn_gate_exps.weight" in str(outcome[0])
    assert queue.counters.failed == 1
    assert queue.counters.nbytes[DEMAND] == bench.model.table.expert_bytes(0)


def test_an_unexpected_error_is_reported_and_the_thread_lives(
    model: Model, segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    broken = [True]

    def pread(fd: int, buffer: memoryview, offset: int) -> int:
        if broken.pop() if broken else False:
            raise RuntimeError("surprise")
        return _pread(fd, buffer, offset)

    bench = Bench(model, segment, pread=pread)
    with bench.queue() as queue:
        queue.submit([bench.fetch(0), bench.fetch(1)])
        assert queue.drain(10)
    assert "surprise" in str(bench.landed[0][1])
    assert bench.landed[1][1] is None
    assert "surprise" in caplog.text


def test_an_error_in_the_callback_does_not_stop_the_queue(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def land(fetch: Fetch, error: StorageError | None) -> None:
        calls.append(fetch.slot)
        raise RuntimeError("receiver is broken")

    queue = FetchQueue(bench.reader, bench.segment, land, 1)
    queue.submit([bench.fetch(0), bench.fetch(1)])
    assert queue.drain(10)
    assert queue.close()
    assert calls == [0, 1]
    assert "receiver is broken" in caplog.text


def test_close_fails_what_is_queued(bench: Bench) -> None:
    bench.gate.clear()
    with bench.queue() as queue:
        running = bench.fetch(0)
        queue.submit([running])
        wait_until(lambda: len(bench.started) == 1)
        queued = [bench.fetch(1), bench.fetch(2, priority=PREFETCH)]
        queue.submit(queued)
        began = time.monotonic()
        # a read that hangs in the kernel cannot be ended, so close gives up on it
        assert not queue.close(timeout_s=0.1)
        assert time.monotonic() - began < 2
        assert [fetch for fetch, _ in bench.landed] == queued
        assert all("closed" in str(error) for _, error in bench.landed)
        with pytest.raises(StorageError, match="closed"):
            queue.submit([bench.fetch(4)])
        assert not queue.drain(0.05)
        bench.gate.set()
        assert queue.close()
        assert queue.drain(0)
    assert bench.landed[-1] == (running, None)


def test_close_ends_an_injected_delay(bench: Bench) -> None:
    queue = FetchQueue(bench.reader, bench.segment, bench.land, 2, lambda _: 60.0)
    queue.submit([bench.fetch(0)])
    began = time.monotonic()
    assert queue.close()
    assert time.monotonic() - began < 5
    assert len(bench.landed) == 1


def test_threads_end(bench: Bench) -> None:
    before = threading.active_count()
    with bench.queue(threads=8):
        assert threading.active_count() == before + 8
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "change",
    [
        {"address": -4096},
        {"address": 1 << 40},
        {"source_address": 1 << 40},
        {"source_address": -2},
        {"source_address": 0, "address": 0},
        {"priority": 2},
    ],
)
def test_bad_fetches(bench: Bench, change: dict[str, int]) -> None:
    with bench.queue() as queue:
        with pytest.raises(ValueError, match=r"outside|priority"):
            queue.submit([bench.fetch(1), replace(bench.fetch(0), **change)])
        with pytest.raises(IndexError):
            queue.submit([bench.fetch(0, layer=99)])
        with pytest.raises(IndexError):
            queue.submit([bench.fetch(0, expert=99)])
        assert queue.drain(10)
    assert not bench.started


def test_no_threads(bench: Bench) -> None:
    with pytest.raises(ValueError, match="0 threads"):
        FetchQueue(bench.reader, bench.segment, bench.land, 0)
