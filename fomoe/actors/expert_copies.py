"""Experts on their way between a node's segment and a device's slots, beside what it computes.

Executes the records of `fomoe.engine.copies`; that page has the rules.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import load_acquire_u64, store_release_u64
from fomoe.actors.expert_parts import ExpertParts, Slots
from fomoe.actors.shared_link import SharedLink
from fomoe.engine.copies import COPY, CopyKind, Outcome
from fomoe.gguf.extents import ExpertTable

if TYPE_CHECKING:
    from fomoe.kernels.gpu.runtime import Runtime

MOST_AHEAD = 2  # loads of ahead lists on the link at a time: what a step's may have to wait for

_Records = npt.NDArray[np.void]
_LOAD, _CANCEL = int(CopyKind.LOAD), int(CopyKind.CANCEL)  # comparing enums takes longer
_KIND, _LAYER, _EXPERT, _VRAM, _SLOT = 4, 5, 6, 7, 8  # where fields of `COPY` stand


@dataclass(frozen=True, slots=True)
class Source:
    """The segment as a device sees it.

    Attributes:
        landed: uint64 [slots], the generation that has landed in each.
        address: where its first slot begins.
    """

    landed: npt.NDArray[np.uint64]
    address: int


Record = tuple[int, ...]  # the fields of `COPY`


class _Job:
    """A record at work; `step` is 0 in ahead lists, `before` the job on the same VRAM slot `at`.

    `names` are slot and generation.
    """

    __slots__ = (
        "at", "before", "begun", "ended", "event", "names", "record", "same", "step", "turn",
    )  # fmt: skip

    def __init__(self, record: Record, at: tuple[int, int], step: int, before: _Job | None) -> None:
        self.record, self.at, self.step, self.before = record, at, step, before
        self.names = record[_SLOT], record[1]
        self.begun = self.ended = False
        self.event = self.turn = 0  # of its copies, which end in the order of their turns
        self.same: _Job | None = None  # the load that brings this one's bytes


class ExpertCopies:
    """Carries out records, on two streams of their own; nothing here waits.

    In the device's table an expert is resident from the beginning of its load on: who computes
    with it lets the compute stream wait, by `hold`.

    Attributes:
        ended: records of ahead lists that are to be answered.
        nbytes: copied so far, in both directions.
    """

    def __init__(
        self, runtime: Runtime, slots: Slots, source: Source, table: ExpertTable,
        link: SharedLink | None = None,
    ) -> None:  # fmt: skip
        self._runtime = runtime
        self._link = link or SharedLink.unshared()
        self._slots = slots
        self._source = source
        self._up, self._down = runtime.stream(), runtime.stream()
        self._events: list[int] = []  # free ones
        self._table = table
        self._parts: dict[int, ExpertParts] = {}  # of the layers that records have named
        self._steps: list[_Job] = []  # loads of steps that have not begun
        self._ahead: deque[_Job] = deque()  # those of ahead lists
        self._loads: deque[_Job] = deque()  # begun and not ended, in the order of their stream
        self._demotes: deque[_Job] = deque()
        self._last: dict[tuple[int, int], _Job] = {}  # on each VRAM slot, by class and number
        self._tenant: dict[tuple[int, int], tuple[int, int]] = {}  # whose load began last there
        self._place: dict[tuple[int, int], tuple[int, int]] = {}  # and where an expert's did
        self._brought: dict[tuple[int, int], tuple[int, int]] = {}  # what that load names
        self._stale: set[int] = set()  # layers whose table the device has not seen
        self._in_flight: dict[int, list[_Job]] = {}  # by step
        self._n_ahead = self._n_demand = 0  # of `_loads`
        self._may_go_on = False  # whether something of an ahead list may begin unannounced
        self._turn = 0
        self.ended: list[Record] = []
        self.nbytes = 0

    @property
    def under_way(self) -> bool:
        """Whether a copy has begun and not ended, or may begin at any time: nobody rings."""
        return bool(self._loads or self._demotes or self._may_go_on)

    @property
    def is_busy(self) -> bool:
        """Whether there is something to look after."""
        return bool(self._loads or self._demotes or self._ahead or self._steps)

    def order(self, records: _Records, step: int = 0) -> None:
        """Take the records of a step, or (0) those of an ahead list, and begin what can begin."""
        jobs = self._in_flight.setdefault(step, []) if step else []
        for record in records.tolist():
            if record[_KIND] == _CANCEL:
                self._cancel(record)
                continue
            job = self._take(record, step)
            if step:
                jobs.append(job)
        self.advance_steps()
        if step:
            self._link.take(step)

    def advance(self) -> None:
        """Take note of what has ended and begin what has landed; of ahead lists one at a time.

        To begin one takes the host some tens of microseconds, in which a step may have come.
        """
        self.advance_steps()
        self._may_go_on = bool(self._ahead)
        if not self._ahead or self._n_ahead >= MOST_AHEAD or not self._link.is_free:
            return
        found = next((job for job in self._ahead if self._may_begin(job)), None)
        if found is None:
            self._may_go_on = False  # storage rings when bytes have landed
        else:
            self._ahead.remove(found)
            self._load(found)

    def advance_steps(self) -> None:
        """The same, and leave ahead lists alone."""
        self._collect()
        if self._steps:
            self._steps = [job for job in self._steps if not self._try(job)]

    def has_begun(self, step: int) -> bool:
        """Whether every load of a step has begun."""
        return not self._steps or all(job.begun for job in self._in_flight.get(step, ()))

    def has_ended(self, step: int) -> bool:
        """Whether every record of a step has ended; it is forgotten then."""
        jobs = self._in_flight.get(step)
        if jobs and not all(job.ended for job in jobs):
            return False
        self._in_flight.pop(step, None)
        return True

    def late(self, step: int, experts: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Return for which experts int32 [K] loads of a step have not ended, bool [K]."""
        jobs = self._in_flight.get(step, ())
        coming = {
            job.record[_EXPERT] for job in jobs if not job.ended and job.record[_KIND] == _LOAD
        }
        return np.array([expert in coming for expert in experts.tolist()], np.bool_)

    def hold(self, step: int, stream: int) -> None:
        """Let a stream wait for the loads of a step, all of which have begun."""
        at_work = [job.same or job for job in self._in_flight.get(step, ())]
        loads = [job for job in at_work if not job.ended and job.record[_KIND] == _LOAD]
        if loads:
            self._runtime.wait(max(loads, key=lambda job: job.turn).event, stream)

    def publish(self, layer: int) -> None:
        """Queue the layer's table for the device, behind its work so far, if it is not known."""
        if layer in self._stale:
            self._stale.discard(layer)
            self._slots.publish(layer)

    def publish_all(self) -> None:
        """The same for all layers."""
        for layer in list(self._stale):
            self.publish(layer)

    def abort(self, step: int) -> None:
        """Loads of the steps up to this one that have not begun never will."""
        for job in [job for job in self._steps if job.step <= step]:
            self._steps.remove(job)
            self._unlink(job)
            job.begun = job.ended = True

    def _take(self, record: Record, step: int) -> _Job:
        at = self._parts_of(record[_LAYER]).size_class, record[_VRAM]
        before = self._last.get(at)
        if before is not None and before.ended:
            before = None
        is_load = record[_KIND] == _LOAD
        job = _Job(record, at, step, before)
        if is_load and before is None and self._lies_there(job, at):
            self._close(job)  # an answer that the driver had not read yet
            return job
        if is_load and before is not None and before.record[_KIND] == _LOAD:
            if before.begun and before.names == job.names:
                job.same = before
            elif not before.begun:
                self._drop(before)
                job.before = self._last.get(at)
        self._last[at] = job
        if not is_load:
            self._demote(job)
        elif job.same is not None:
            job.begun = True
            self._on_link(job)
        elif step:
            if not self._try(job):  # at once: the link idles until the first one begins
                self._steps.append(job)
        else:
            self._ahead.append(job)
            self._may_go_on = True
        return job

    def _cancel(self, record: Record) -> None:
        names = record[_SLOT], record[1]
        for job in [job for job in self._ahead if job.names == names]:
            self._drop(job)

    def _drop(self, job: _Job) -> None:
        """An ahead load that has not begun never will."""
        self._ahead.remove(job)
        self._unlink(job)
        job.begun = job.ended = True
        self.ended.append((*job.record[:-1], int(Outcome.DROPPED)))

    def _unlink(self, job: _Job) -> None:
        at = job.at
        if self._last.get(at) is job:
            if job.before is None:
                del self._last[at]
            else:
                self._last[at] = job.before

    def _parts_of(self, layer: int) -> ExpertParts:
        parts = self._parts.get(layer)
        if parts is None:
            parts = self._parts[layer] = ExpertParts(self._slots, self._table, layer)
        return parts

    def _may_begin(self, job: _Job) -> bool:
        if job.before is not None and not job.before.begun:
            return False
        slot, generation = job.names
        return bool(load_acquire_u64(self._source.landed, slot) >= generation)

    def _try(self, job: _Job) -> bool:
        if not self._may_begin(job):
            return False
        self._load(job)
        return True

    def _load(self, job: _Job) -> None:
        record = job.record
        layer, expert, at = record[_LAYER], record[_EXPERT], job.at
        self._on_link(job)
        self._copy(job, self._up)  # first of all: accounts can wait
        before = self._tenant.get(at)
        if before is not None and self._place.get(before) == at:
            self._slots.set(*before, None)
            del self._place[before]
            self._stale.add(before[0])
        self._tenant[at], self._place[layer, expert] = (layer, expert), at
        self._brought[at] = job.names
        self._slots.set(layer, expert, record[_VRAM])
        self._stale.add(layer)
        self._n_ahead += not job.step

    def _on_link(self, job: _Job) -> None:
        """Count a load; the others are to know before the bytes are on their way."""
        self._loads.append(job)
        if job.step:
            self._n_demand += 1
            self._link.carry(self._n_demand)

    def _demote(self, job: _Job) -> None:
        self._copy(job, self._down)
        self._demotes.append(job)

    def _lies_there(self, job: _Job, at: tuple[int, int]) -> bool:
        place = self._place.get((job.record[_LAYER], job.record[_EXPERT]))
        return place == at and self._brought[at] == job.names

    def _close(self, job: _Job) -> None:
        """What a load asks for lies there."""
        job.begun = job.ended = True
        if not job.step:
            self.ended.append((*job.record[:-1], int(Outcome.DONE)))

    def _copy(self, job: _Job, stream: int) -> None:
        """Queue the parts of an expert behind the copy before it on the same VRAM slot."""
        runtime, record, before = self._runtime, job.record, job.before
        parts = self._parts_of(record[_LAYER])
        if before is not None and not before.ended:
            runtime.wait((before.same or before).event, stream)
        base = self._slots.slot_address(*job.at)
        start = self._source.address + record[0]
        up = record[_KIND] == _LOAD
        for there, here, nbytes in zip(
            parts.in_slot, parts.in_segment[record[_EXPERT]], parts.sizes, strict=True
        ):
            if up:
                runtime.copy(base + there, start + here, nbytes, stream)
            else:
                runtime.copy(start + here, base + there, nbytes, stream)
            self.nbytes += nbytes
        job.event = self._events.pop() if self._events else runtime.event()
        runtime.record(job.event, stream)
        self._turn += 1
        job.begun, job.turn = True, self._turn
        job.before = None  # the stream keeps the order from here on

    def _collect(self) -> None:
        runtime = self._runtime
        while self._loads:
            job = self._loads[0]
            if not ((job.same is not None and job.same.ended) or runtime.done(
                (job.same or job).event)):  # fmt: skip
                break
            self._loads.popleft()
            self._end(job)
            if job.step:
                self._n_demand -= 1
                self._link.carry(self._n_demand)
        while self._demotes and runtime.done(self._demotes[0].event):
            job = self._demotes.popleft()
            slot, generation = job.names
            store_release_u64(self._source.landed, slot, generation)
            self._end(job)

    def _end(self, job: _Job) -> None:
        job.ended = True
        if job.same is None:
            self._events.append(job.event)
        if self._last.get(job.at) is job:
            del self._last[job.at]
        if not job.step:
            self._n_ahead -= job.same is None and job.record[_KIND] == _LOAD
            self.ended.append((*job.record[:-1], int(Outcome.DONE)))


def as_records(records: list[Record]) -> _Records:
    """Return records of `COPY` as an array."""
    return np.array(records, COPY)
