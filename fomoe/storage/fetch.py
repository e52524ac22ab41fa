"""A queue of expert reads into slots of a segment: demand before prefetch, one job per slot.

Order. A job writes one slot (`address`) and may read another (`source_address`). Jobs that touch
the same slot run one after the other in the order of submission; all others run at the same time,
demand reads first. The first job in that order never waits for another, so nothing can lock up.

Pieces. A read is cut into pieces that the threads take in order, so that one expert keeps the drive
as busy as many do, and a demand read waits at most for the pieces of prefetches under way.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from fomoe.errors import StorageError
from fomoe.storage.jobs import DEMAND, PREFETCH, Fetch, FetchCounters, Job, same_read
from fomoe.storage.pieces import Piece
from fomoe.storage.reader import DirectReader
from fomoe.storage.segment import Segment

_log = logging.getLogger(__name__)

__all__ = ["DEMAND", "PREFETCH", "Fetch", "FetchCounters", "FetchQueue"]

# Enough that reads of it are as fast as any, few enough that one is done in a few milliseconds.
DEMAND_PIECE_BYTES = 4 << 20
PREFETCH_PIECE_BYTES = 1 << 19  # two of them are what a demand read may have to wait for
_COPY: tuple[Piece, ...] = ((),)
_CLOSE_S = 5.0


class FetchQueue:
    """Threads that execute fetches; every submitted fetch lands, fails, or is dropped.

    Args:
        reader: reads experts from the files.
        segment: holds the slots.
        on_landed: called from a worker thread after the bytes of a fetch are in place (error
            None) or when it failed. Not called for dropped prefetches.
        threads: number of worker threads; at most half of them, but one, read prefetches.
        delay: seconds to wait before executing a fetch, for tests of slow drives.
    """

    def __init__(
        self,
        reader: DirectReader,
        segment: Segment,
        on_landed: Callable[[Fetch, StorageError | None], None],
        threads: int = 4,
        delay: Callable[[Fetch], float] | None = None,
    ) -> None:
        if threads < 1:
            raise ValueError(f"{threads} threads")
        self.counters = FetchCounters()
        self._reader = reader
        self._segment = segment
        table = reader.table
        self._slot_bytes = {layer: table.slot_bytes(layer) for layer in table.layers}
        self._n_experts = table.n_experts
        self._on_landed = on_landed
        self._delay = delay
        lock = threading.Lock()
        self._changed = threading.Condition(lock)
        self._idle = threading.Condition(lock)
        self._closing = threading.Event()
        self._ready: list[tuple[int, int, Job]] = []
        self._chains: dict[int, deque[Job]] = {}
        self._held: dict[int, Fetch] = {}  # by address, whose bytes lie there
        self._unfinished = 0
        self._order = 0
        self._running = [0, 0]  # pieces by priority
        self._most_prefetches = max(1, threads // 2)
        self._threads = [
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, fetches: Iterable[Fetch]) -> tuple[Fetch, ...]:
        """Queue fetches; returns the queued prefetches that they drop by taking their slots.

        A read of the same content into the same slot that is queued, running or done already is not
        repeated: both land with one call of `on_landed`, a queued prefetch at the newer priority.
        One that has failed is.

        Raises:
            StorageError: the queue is closed.
            ValueError: a fetch's addresses or priority are out of range; none is queued then.
        """
        fetches = tuple(fetches)
        for fetch in fetches:
            self._check(fetch)
        dropped: list[Fetch] = []
        with self._changed:
            if self._closing.is_set():
                raise StorageError("the fetch queue is closed; its storage actor is stopping")
            for fetch in fetches:
                if not self._join(fetch):
                    dropped += self._supersede(fetch)
                    self._enqueue(fetch)
            self._changed.notify_all()
        return tuple(dropped)

    def cancel_prefetch(self, layer: int | None = None) -> tuple[Fetch, ...]:
        """Drop the queued prefetches, of a layer or all, that no demand read waits for.

        Those marked `keep` stay.

        Returns those that were dropped.
        """
        with self._changed:
            queued = [
                job
                for job in self._jobs()
                if job.droppable and not job.fetch.keep and layer in (None, job.fetch.layer)
            ]
            for job in queued:
                self._drop(job)
            self._changed.notify_all()
        return tuple(job.fetch for job in queued)

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or running; False when that took too long."""
        with self._idle:
            return self._idle.wait_for(lambda: self._unfinished == 0, timeout_s)

    def close(self, timeout_s: float = _CLOSE_S) -> bool:
        """Fail what is queued, wait for what is running; False when a read did not end in time."""
        with self._changed:
            self._closing.set()
            queued = [job for job in self._jobs() if not job.started]
            for job in queued:
                self._drop(job)
            self._changed.notify_all()
        for job in queued:
            self._report(job.fetch, StorageError("the fetch queue was closed before the read"))
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _jobs(self) -> list[Job]:
        """All jobs in the queue in the order of submission."""
        jobs = {job.order: job for chain in self._chains.values() for job in chain}
        return [jobs[order] for order in sorted(jobs)]

    def _check(self, fetch: Fetch) -> None:
        slot_bytes = self._slot_bytes.get(fetch.layer)
        if slot_bytes is None or not 0 <= fetch.expert < self._n_experts:
            raise IndexError(f"layer {fetch.layer}, expert {fetch.expert} is not in the model")
        last = self._segment.nbytes - slot_bytes
        if not 0 <= fetch.address <= last or not -1 <= fetch.source_address <= last:
            raise ValueError(f"{fetch} lies outside the segment of {self._segment.nbytes} bytes")
        if fetch.priority not in (DEMAND, PREFETCH) or fetch.source_address == fetch.address:
            raise ValueError(f"{fetch} has no valid priority or copies a slot onto itself")

    def _join(self, fetch: Fetch) -> bool:
        """Let a read that is asked for again land once: hurry it if need be, read it no more."""
        chain = self._chains.get(fetch.address)
        if not chain or chain[-1].reported:
            held = self._held.get(fetch.address)
            if held is None or not same_read(held, fetch):
                return False
            self.counters.met[2] += fetch.priority == DEMAND
            return True
        job = chain[-1]
        if not same_read(job.fetch, fetch):
            return False
        if fetch.priority == DEMAND and job.fetch.priority == PREFETCH:
            self.counters.met[job.started] += 1
            job.fetch = fetch  # it is the demand that lands or fails, also where it runs already
            self._hurry(job)
            self._promote(job)
        return True

    def _supersede(self, fetch: Fetch) -> list[Fetch]:
        """Drop the queued prefetches whose bytes `fetch` would overwrite unread."""
        dropped: list[Fetch] = []
        for job in reversed(tuple(self._chains.get(fetch.address, ()))):
            if job.fetch.address != fetch.address or not job.droppable:
                break
            self._drop(job)
            dropped.append(job.fetch)
        return dropped

    def _enqueue(self, fetch: Fetch) -> None:
        most = DEMAND_PIECE_BYTES if fetch.priority == DEMAND else PREFETCH_PIECE_BYTES
        pieces = (
            self._reader.pieces(fetch.layer, fetch.expert, most)
            if fetch.source_address < 0
            else _COPY
        )
        job = Job(fetch, self._order, fetch.priority, pieces)
        self._held.pop(fetch.address, None)
        self._order += 1
        self._unfinished += 1
        self.counters.opened(job.priority, 1)
        for address in job.addresses:
            chain = self._chains.setdefault(address, deque())
            job.blockers += bool(chain)
            chain.append(job)
        if job.blockers == 0:
            heapq.heappush(self._ready, (job.priority, job.order, job))
        elif job.priority == DEMAND:
            self._promote(job)

    def _promote(self, job: Job) -> None:
        """Give every queued prefetch that a demand read waits for the demand's priority."""
        waiting = [job]
        while waiting:
            demand = waiting.pop()
            for address in demand.addresses:
                for earlier in self._chains[address]:
                    if earlier.order >= demand.order:
                        break
                    if earlier.priority == PREFETCH:
                        self._hurry(earlier)
                        waiting.append(earlier)

    def _hurry(self, job: Job) -> None:
        if job.priority == DEMAND:
            return
        self.counters.opened(PREFETCH, -1)
        self.counters.opened(DEMAND, 1)
        job.priority = DEMAND
        if job.blockers == 0 and job.has_pieces:
            heapq.heappush(self._ready, (DEMAND, job.order, job))

    def _drop(self, job: Job) -> None:
        job.dropped = True
        self.counters.dropped += 1
        self._unlink(job)

    def _unlink(self, job: Job) -> None:
        """Take a finished or dropped job out of its slots' chains and free the next ones."""
        for address in job.addresses:
            chain = self._chains[address]
            was_head = chain[0] is job
            chain.remove(job)
            if not chain:
                del self._chains[address]
            elif was_head:
                follower = chain[0]
                follower.blockers -= 1
                if follower.blockers == 0:
                    heapq.heappush(self._ready, (follower.priority, follower.order, follower))
        self.counters.opened(job.priority, -1)
        self._unfinished -= 1
        if self._unfinished == 0:
            self._idle.notify_all()

    def _next(self) -> Job | None:
        """The job whose next piece is to be read, None to end; the lock is held."""
        while True:
            while self._ready:
                priority, _, job = self._ready[0]
                if job.dropped or not job.has_pieces or priority != job.priority:
                    heapq.heappop(self._ready)  # used up, or a leftover of a drop or a promotion
                elif priority == PREFETCH and not self._is_idle_time():
                    break
                else:
                    return job
            if self._closing.is_set():
                return None
            self._changed.wait()

    def _is_idle_time(self) -> bool:
        """Whether a prefetch may be read: nothing demanded is being read, and not too many are."""
        return not self._running[DEMAND] and self._running[PREFETCH] < self._most_prefetches

    def _work(self) -> None:
        while True:
            with self._changed:
                job = self._next()
                if job is None:
                    return
                first = not job.started
                piece, priority = job.hand_out(), job.priority
                self._running[priority] += 1
            began = time.perf_counter()
            if first and self._delay is not None:
                self._closing.wait(self._delay(job.fetch))
            nbytes, error = self._execute(job.fetch, piece)
            busy = time.perf_counter() - began
            with self._changed:
                self._running[priority] -= 1
                self.counters.busy_s[priority] += busy
                self.counters.nbytes[priority] += nbytes
                ended = self._end_piece(job, nbytes, error)
                if self._most_prefetches > 1 and not self._running[DEMAND]:
                    self._changed.notify(self._most_prefetches)
            if ended:
                self._finish(job)

    def _end_piece(self, job: Job, nbytes: int, error: StorageError | None) -> bool:
        """Count a piece; returns whether the job has landed or failed. The lock is held."""
        if not job.take_back(nbytes, error):
            return False
        if job.must_repeat:
            job.repeat()
            heapq.heappush(self._ready, (job.priority, job.order, job))
            self._changed.notify_all()
            return False
        job.reported = True
        if job.error is None:
            self._held[job.fetch.address] = job.fetch
        return True

    def _finish(self, job: Job) -> None:
        self._report(job.fetch, job.error)
        with self._changed:
            self.counters.jobs[job.fetch.priority] += 1
            self.counters.failed += job.error is not None
            self._unlink(job)
            # a finished job frees at most two slots and a prefetch's place; this thread takes
            # one of the three jobs that may have become ready
            self._changed.notify(2)

    def _execute(self, fetch: Fetch, piece: Piece) -> tuple[int, StorageError | None]:
        nbytes = self._slot_bytes[fetch.layer]
        slot = self._segment.view[fetch.address : fetch.address + nbytes]
        try:
            if fetch.source_address < 0:
                return self._reader.read_piece(piece, fetch.expert, slot.data), None
            slot[:] = self._segment.view[fetch.source_address : fetch.source_address + nbytes]
            return self._reader.table.expert_bytes(fetch.layer), None
        except StorageError as error:
            return 0, error
        except Exception as error:
            _log.exception("fetch of layer %d, expert %d", fetch.layer, fetch.expert)
            return 0, StorageError(f"layer {fetch.layer}, expert {fetch.expert}: {error!r}")

    def _report(self, fetch: Fetch, error: StorageError | None) -> None:
        try:
            self._on_landed(fetch, error)
        except Exception:
            _log.exception("on_landed failed for layer %d, expert %d", fetch.layer, fetch.expert)
