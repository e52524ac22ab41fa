"""An expert is read in pieces by all threads; a prefetch takes what demand leaves."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from expert_files import Model
from fetch_bench import Bench, wait_until

from fomoe.storage import fetch as fetch_module
from fomoe.storage import pieces as pieces_module
from fomoe.storage.fetch import DEMAND, PREFETCH
from fomoe.storage.reader import _pread
from fomoe.storage.segment import Segment


class Pieces:
    """A pread that stops at each read until it is let go, and tells who came in which order."""

    def __init__(self) -> None:
        self.waiting: list[int] = []
        self._lock = threading.Condition()
        self._free = 0

    def __call__(self, fd: int, buffer: memoryview, offset: int) -> int:
        with self._lock:
            self.waiting.append(offset)
            assert self._lock.wait_for(lambda: self._free > 0, 30)
            self._free -= 1
        return _pread(fd, buffer, offset)

    def let_go(self, count: int) -> None:
        with self._lock:
            self._free += count
            self._lock.notify_all()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page at a time, so that a tiny expert has many pieces."""
    monkeypatch.setattr(fetch_module, "PREFETCH_PIECE_BYTES", 4096)
    monkeypatch.setattr(fetch_module, "DEMAND_PIECE_BYTES", 8192)
    monkeypatch.setattr(pieces_module, "SMALL_BYTES", 0)


@pytest.mark.usefixtures("small_pieces")
def test_one_expert_is_read_by_all_threads(model: Model, segment: Segment) -> None:
    pread = Pieces()
    bench = Bench(model, segment, pread=pread)
    with bench.queue(threads=3) as queue:
        queue.submit([bench.fetch(0, 2, 5)])
        wait_until(lambda: len(pread.waiting) == 3)
        pread.let_go(1000)
        assert queue.drain(10)
    assert len(bench.landed) == 1
    assert model.in_slot(2, 5, bench.slot(0))
    assert queue.counters.nbytes == [model.table.expert_bytes(2), 0]


@pytest.mark.usefixtures("small_pieces")
def test_a_demand_waits_for_one_piece_of_a_prefetch(model: Model, segment: Segment) -> None:
    pread = Pieces()
    bench = Bench(model, segment, pread=pread)
    with bench.queue() as queue:
        queue.submit([bench.fetch(0, 0, 5, priority=PREFETCH)])
        wait_until(lambda: len(pread.waiting) == 1)
        queue.submit([bench.fetch(1, 1, 6)])
        demanded = len(queue._reader.pieces(1, 6, 8192))
        pread.let_go(1 + demanded)
        wait_until(lambda: len(bench.landed) == 1)
        assert bench.landed[0][0].slot == 1
        pread.let_go(1000)
        assert queue.drain(10)
    assert all(model.in_slot(f.layer, f.expert, bench.slot(f.slot)) for f, _ in bench.landed)
    assert queue.counters.nbytes == [
        model.table.expert_bytes(1), model.table.expert_bytes(0)
    ]  # fmt: skip
    assert all(seconds > 0 for seconds in queue.counters.open_s)


@pytest.mark.usefixtures("small_pieces")
def test_a_prefetch_that_is_demanded_goes_on_as_one(model: Model, segment: Segment) -> None:
    """The pieces that are left are read by all threads, ahead of other prefetches."""
    pread = Pieces()
    bench = Bench(model, segment, pread=pread)
    with bench.queue(threads=3) as queue:
        guess = bench.fetch(0, 2, 5, priority=PREFETCH)
        queue.submit([guess, bench.fetch(1, 0, 1, priority=PREFETCH)])
        wait_until(lambda: len(pread.waiting) == 1)
        queue.submit([replace(guess, priority=DEMAND)])
        wait_until(lambda: len(pread.waiting) == 3)
        pread.let_go(1000)
        assert queue.drain(10)
    assert [fetch.slot for fetch, _ in bench.landed] == [0, 1]
    assert model.in_slot(2, 5, bench.slot(0))
    read = queue.counters.nbytes
    assert sum(read) == sum(model.table.expert_bytes(layer) for layer in (2, 0))
    assert 0 < read[PREFETCH] - model.table.expert_bytes(0) <= 4096


@pytest.mark.usefixtures("small_pieces")
def test_one_failed_piece_fails_the_expert_once(bench: Bench) -> None:
    extent = bench.model.table.extents(2, 5)[0]
    with bench.queue(threads=4) as queue:
        with bench.model.file.shards[extent.shard].open("r+b") as file:
            file.truncate(extent.offset)
        queue.submit([bench.fetch(0, 2, 5)])
        assert queue.drain(10)
    assert len(bench.landed) == 1
    assert "exps.weight, expert 5: " in str(bench.landed[0][1])
