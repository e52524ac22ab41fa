"""The fetch queue: what is asked for again while it is queued, under way, landing or there."""

from __future__ import annotations

import threading
from dataclasses import replace

from fetch_bench import Bench, wait_until

from fomoe.errors import StorageError
from fomoe.storage.fetch import DEMAND, PREFETCH, Fetch, FetchQueue


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


class Announcing:
    """Holds up the announcement of every landing until `go_on` is set."""

    def __init__(self, bench: Bench) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.calls: list[tuple[Fetch, bool]] = []
        self.queue = FetchQueue(bench.reader, bench.segment, self._land, 1)

    def _land(self, fetch: Fetch, error: StorageError | None) -> None:
        self.calls.append((fetch, error is None))
        self.begun.set()
        assert self.go_on.wait(10)

    def end(self) -> list[tuple[Fetch, bool]]:
        self.go_on.set()
        assert self.queue.drain(10)
        assert self.queue.close()
        return self.calls


def test_a_guess_that_is_demanded_while_it_is_announced_is_read_once(bench: Bench) -> None:
    announcing = Announcing(bench)
    guess = bench.fetch(0, priority=PREFETCH)
    announcing.queue.submit([guess])
    assert announcing.begun.wait(10)
    assert announcing.queue.submit([replace(guess, priority=DEMAND)]) == ()
    assert announcing.end() == [(guess, True)]
    assert announcing.queue.counters.met == [0, 0, 1]


def test_a_failure_that_is_being_announced_is_tried_again(bench: Bench) -> None:
    announcing = Announcing(bench)
    for shard in bench.model.file.shards:
        with shard.open("r+b") as file:
            file.truncate(0)
    guess = bench.fetch(0, priority=PREFETCH)
    demand = replace(guess, priority=DEMAND)
    announcing.queue.submit([guess])
    assert announcing.begun.wait(10)
    announcing.queue.submit([demand])
    assert announcing.end() == [(guess, False), (demand, False)]


def test_what_a_slot_holds_is_not_read_again(bench: Bench) -> None:
    with bench.queue() as queue:
        guess, other = bench.fetch(0, 1, 2, priority=PREFETCH), bench.fetch(0, 1, 3)
        again = replace(guess, priority=DEMAND)
        for fetches in ([guess], [again], [other], [guess]):
            queue.submit(fetches)
            assert queue.drain(10)
    assert [fetch for fetch, _ in bench.landed] == [guess, other, guess]
    assert queue.counters.met == [0, 0, 1]
    assert bench.model.in_slot(1, 2, bench.slot(0))


def test_what_a_later_read_is_to_overwrite_is_read_again(bench: Bench) -> None:
    with bench.queue() as queue:
        first, other = bench.fetch(0, 1, 2), bench.fetch(0, 1, 3)
        queue.submit([first])
        assert queue.drain(10)
        bench.gate.clear()
        queue.submit([other, first])
        bench.gate.set()
        assert queue.drain(10)
    assert [fetch for fetch, _ in bench.landed] == [first, other, first]
