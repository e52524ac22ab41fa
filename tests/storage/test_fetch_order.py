"""The order of the fetch queue, against a slow and obvious twin."""

from __future__ import annotations

import threading

import pytest
from expert_files import EXPERTS, Model, write_model
from fetch_bench import SLOTS, Bench, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fomoe.errors import StorageError
from fomoe.storage.fetch import DEMAND, PREFETCH, Fetch, FetchQueue
from fomoe.storage.segment import Segment


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
