"""The fetch queue: order, priority, one job per slot, errors, and an end in bounded time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from expert_files import EXPERTS, LAYERS, Model, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fomoe.errors import StorageError
from fomoe.storage.fetch import DEMAND, PREFETCH, Fetch, FetchQueue
from fomoe.storage.reader import DirectReader, _pread
from fomoe.storage.segment import Segment

SLOTS = 5
Landing = tuple[Fetch, StorageError | None]


class Bench:
    """A queue over a model, with slots, a gate that holds jobs back, and a record of what ran."""

    def __init__(self, model: Model, segment: Segment, *, pread: Callable = _pread) -> None:
        self.model = model
        self.segment = segment
        self.reader = DirectReader(
            model.file.shards, model.table, pread=pread, sleep=lambda _: None
        )
        self.gate = threading.Event()
        self.gate.set()
        self.started: list[Fetch] = []
        self.landed: list[Landing] = []
        self.generation = 0

    def fetch(self, slot: int, layer: int = 0, expert: int = 0, **rest: int) -> Fetch:
        self.generation += 1
        source = rest.pop("source", None)
        if source is not None:
            rest["source_address"] = source * self.model.slot_bytes
        return Fetch(
            slot=slot,
            address=slot * self.model.slot_bytes,
            generation=self.generation,
            layer=layer,
            expert=expert,
            **rest,
        )

    def hold(self, fetch: Fetch) -> float:
        self.started.append(fetch)
        assert self.gate.wait(30)
        return 0.0

    def land(self, fetch: Fetch, error: StorageError | None) -> None:
        self.landed.append((fetch, error))

    @contextmanager
    def queue(self, threads: int = 1) -> Iterator[FetchQueue]:
        queue = FetchQueue(self.reader, self.segment, self.land, threads, self.hold)
        try:
            yield queue
        finally:
            self.gate.set()
            assert queue.close()
            self.reader.close()

    def slot(self, number: int) -> np.ndarray:
        size = self.model.slot_bytes
        return self.segment.view[number * size : (number + 1) * size]


@pytest.fixture
def bench(model: Model, segment: Segment) -> Bench:
    return Bench(model, segment)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


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


def test_one_thread_is_kept_free_of_prefetches(bench: Bench) -> None:
    bench.gate.clear()
    with bench.queue(threads=3) as queue:
        queue.submit([bench.fetch(slot, priority=PREFETCH) for slot in range(5)])
        wait_until(lambda: len(bench.started) == 2)
        queue.submit([bench.fetch(6)])
        wait_until(lambda: len(bench.started) == 3)
        assert bench.started[2].slot == 6
        bench.gate.set()
        assert queue.drain(10)
    assert len(bench.landed) == 6


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


def test_a_prefetch_that_a_demand_copies_from_is_not_dropped_but_hurried(bench: Bench) -> None:
    bench.gate.clear()
    with bench.queue() as queue:
        queue.submit([bench.fetch(0)])
        wait_until(lambda: len(bench.started) == 1)
        queue.submit([bench.fetch(3, 0, 3, priority=PREFETCH)])
        queue.submit([bench.fetch(1, 0, 5, priority=PREFETCH)])
        queue.submit([bench.fetch(2, 0, 5, source=1)])
        assert queue.submit([bench.fetch(1, 0, 6)]) == ()
        assert [fetch.slot for fetch in queue.cancel_prefetch()] == [3]
        queue.submit([bench.fetch(3, 0, 3, priority=PREFETCH)])
        bench.gate.set()
        assert queue.drain(10)
    assert [fetch.slot for fetch in bench.started] == [0, 1, 2, 1, 3]
    assert bench.model.in_slot(0, 5, bench.slot(2))
    assert bench.model.in_slot(0, 6, bench.slot(1))


def test_a_queued_prefetch_that_is_demanded_is_hurried_and_read_once(bench: Bench) -> None:
    bench.gate.clear()
    with bench.queue() as queue:
        queue.submit([bench.fetch(0)])
        wait_until(lambda: len(bench.started) == 1)
        other, wanted = (bench.fetch(slot, 1, slot, priority=PREFETCH) for slot in (1, 2))
        queue.submit([other, wanted])
        demand = replace(wanted, priority=DEMAND)
        assert queue.submit([demand]) == ()
        assert queue.submit([wanted]) == ()
        assert queue.cancel_prefetch() == (other,)
        queue.submit([other])
        bench.gate.set()
        assert queue.drain(10)
    assert [fetch for fetch, _ in bench.landed][1:] == [demand, other]
    assert bench.model.in_slot(1, 2, bench.slot(2))


def test_a_running_prefetch_that_is_demanded_is_read_once(bench: Bench) -> None:
    bench.gate.clear()
    with bench.queue(threads=3) as queue:
        prefetch = bench.fetch(0, priority=PREFETCH)
        queue.submit([prefetch])
        wait_until(lambda: len(bench.started) == 1)
        assert queue.submit([replace(prefetch, priority=DEMAND)]) == ()
        assert queue.submit([replace(prefetch, priority=DEMAND, generation=99)]) == ()
        bench.gate.set()
        assert queue.drain(10)
    # another generation is another content, which is read after the first
    assert [fetch.generation for fetch, _ in bench.landed] == [prefetch.generation, 99]


def test_a_read_that_is_being_announced_is_read_again(bench: Bench) -> None:
    announcing = threading.Event()
    go_on = threading.Event()
    calls: list[Fetch] = []

    def land(fetch: Fetch, error: StorageError | None) -> None:
        calls.append(fetch)
        announcing.set()
        assert go_on.wait(10)

    queue = FetchQueue(bench.reader, bench.segment, land, 1)
    fetch = bench.fetch(0)
    queue.submit([fetch])
    assert announcing.wait(10)
    queue.submit([fetch])
    go_on.set()
    assert queue.drain(10)
    assert queue.close()
    assert calls == [fetch, fetch]


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


# Order, against a slow and obvious twin.


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return write_model(tmp_path_factory.mktemp("experts"))


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """Jobs (slot, expert, priority, source slot or -1)."""
    jobs = []
    for _ in range(draw(st.integers(1, 14))):
        slot, source = draw(st.integers(0, SLOTS - 1)), draw(st.integers(-SLOTS, SLOTS - 1))
        source = -1 if source < 0 or source == slot else source
        jobs.append((slot, draw(st.integers(0, EXPERTS - 1)), draw(st.integers(0, 1)), source))
    return jobs


def touches(fetch: Fetch) -> set[int]:
    return {fetch.address, fetch.source_address} - {-1}


def blocks(earlier: Fetch, later: Fetch) -> bool:
    return bool(touches(earlier) & touches(later))


def oracle_drops(queued: list[Fetch], new: Fetch) -> list[Fetch]:
    """The queued prefetches that `new` overwrites before anybody else has used their slot."""
    dropped: list[Fetch] = []
    for job in reversed(queued):
        if new.address not in touches(job):
            continue
        if job.address != new.address or not urgency(job, queued):
            break
        dropped.append(job)
        queued = [each for each in queued if each is not job]
    return dropped


def urgency(job: Fetch, queued: list[Fetch]) -> int:
    """DEMAND when `job` is one or, directly or not, blocks one."""
    if job.priority == DEMAND:
        return DEMAND
    later = [each for each in queued if each.generation > job.generation and blocks(job, each)]
    return min([urgency(each, queued) for each in later], default=PREFETCH)


def oracle_order(queued: list[Fetch]) -> list[Fetch]:
    """The order in which one thread runs the jobs."""
    order: list[Fetch] = []
    left = list(queued)
    while left:
        free = [
            job
            for number, job in enumerate(left)
            if not any(blocks(earlier, job) for earlier in left[:number])
        ]
        job = min(free, key=lambda each: (urgency(each, left), each.generation))
        left.remove(job)
        order.append(job)
    return order


checked = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@checked
@given(program=programs())
def test_one_thread_runs_jobs_in_the_order_of_the_twin(
    shared: Model, program: list[tuple[int, int, int, int]]
) -> None:
    with Segment.create((SLOTS + 1) * shared.slot_bytes) as segment:
        bench = Bench(shared, segment)
        bench.gate.clear()
        with bench.queue() as queue:
            queue.submit([bench.fetch(SLOTS)])
            wait_until(lambda: len(bench.started) == 1)
            queued: list[Fetch] = []
            for slot, expert, priority, source in program:
                rest = {"source": source} if source >= 0 else {}
                fetch = bench.fetch(slot, 0, expert, priority=priority, **rest)
                dropped = oracle_drops(queued, fetch)
                assert list(queue.submit([fetch])) == dropped
                queued = [each for each in queued if each not in dropped] + [fetch]
            bench.gate.set()
            assert queue.drain(20)
        assert bench.started[1:] == oracle_order(queued)
        assert [fetch for fetch, _ in bench.landed][1:] == bench.started[1:]


class Watch:
    """Checks while jobs run that no two of them touch the same slot."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.active: set[int] = set()
        self.landed: list[Fetch] = []
        self.faults: list[str] = []

    def begin(self, fetch: Fetch) -> float:
        with self.lock:
            if self.active & touches(fetch):
                self.faults.append(f"{fetch} ran beside another job of its slot")
            self.active |= touches(fetch)
        return fetch.expert * 0.0003

    def end(self, fetch: Fetch, error: StorageError | None) -> None:
        with self.lock:
            self.active -= touches(fetch)
            self.landed.append(fetch)
            if error is not None:
                self.faults.append(str(error))


@checked
@given(program=programs(), cancel_at=st.sets(st.integers(0, 14), max_size=2))
def test_many_threads_leave_what_one_after_the_other_would(
    shared: Model, program: list[tuple[int, int, int, int]], cancel_at: set[int]
) -> None:
    with Segment.create(SLOTS * shared.slot_bytes) as segment:
        bench, watch = Bench(shared, segment), Watch()
        segment.view[:] = 0
        queue = FetchQueue(bench.reader, segment, watch.end, 3, watch.begin)
        live: list[Fetch] = []
        for number, (slot, expert, priority, source) in enumerate(program):
            rest = {"source": source} if source >= 0 else {}
            fetch = bench.fetch(slot, 0, expert, priority=priority, **rest)
            dropped = queue.submit([fetch])
            if number in cancel_at:
                dropped += queue.cancel_prefetch()
            assert all(each.priority == PREFETCH for each in dropped)
            live = [each for each in [*live, fetch] if each not in dropped]
        assert queue.drain(20)
        assert queue.close()
        bench.reader.close()
        assert not watch.faults
        assert sorted(watch.landed, key=lambda each: each.generation) == live
        contents: dict[int, int | None] = {}
        for fetch in live:
            copied = contents.get(fetch.source_address)
            contents[fetch.address] = fetch.expert if fetch.source_address < 0 else copied
        for address, expert in contents.items():
            slot = segment.view[address : address + shared.slot_bytes]
            if expert is None:
                assert not slot.any()
            else:
                assert shared.in_slot(0, expert, slot)
