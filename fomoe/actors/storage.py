"""Storage actor: the RAM tier's segment and every read of expert bytes on its node."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fomoe.actors.arm_costs import processor_s
from fomoe.actors.channel import store_release_u64
from fomoe.actors.messages import COUNT, DROPPED, STEP_ID, Priority, ReadFailed, Tag, encode
from fomoe.actors.process import FabricMember, LoopThread, log
from fomoe.actors.processor_arm import ArmPlan, ArmSegment, ProcessorArm
from fomoe.engine.transfers import READ
from fomoe.errors import ChannelError, StorageError
from fomoe.gguf.extents import ExpertTable
from fomoe.storage.fetch import DEMAND, PREFETCH, Fetch, FetchQueue
from fomoe.storage.reader import DirectReader
from fomoe.storage.segment import Segment, SegmentHandle

_SEND_BOUND_S = 5.0
_SPIN_US = 1000.0  # beside GPUs, while a token is in flight: as long as a layer may take
_IDLE = (Priority.PREFETCH, Priority.BACKGROUND)  # read when nothing is demanded
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class StoragePlan:
    """What a storage actor holds: files, where experts lie in them, slots of the segment.

    The segment starts with one landed word (u64) per slot, padded to a page; slots follow. `arm` is
    there where experts may be computed in it beside GPUs.
    """

    shards: tuple[str, ...]
    table: dict[str, Any]
    n_slots: int
    slots_bytes: int
    threads: int
    arm: ArmPlan | None = None

    @property
    def header_bytes(self) -> int:
        """Bytes of the landed words."""
        return landed_bytes(self.n_slots)


def landed_bytes(n_slots: int) -> int:
    """Return the size of the landed words at the head of a segment, in whole pages.

    At least one page: the driver's box has a segment even where no device stands on it.
    """
    return max(1, -(-n_slots * 8 // _PAGE)) * _PAGE


class StorageActor(FabricMember):
    """Reads experts into the node's shared segment as the driver asks."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._queue: FetchQueue | None = None
        self._loop: LoopThread | None = None
        self._segment: Segment | None = None
        self._reader: DirectReader | None = None
        self._readers_ended = True
        self._send_lock = threading.Lock()
        self._arm: ProcessorArm | None = None

    def open(
        self, plan: StoragePlan, delay: Callable[[Fetch], float] | None = None
    ) -> SegmentHandle:
        """Reserve the segment and open the files; returns the segment's handle."""
        self._segment = Segment.create(plan.header_bytes + plan.slots_bytes)
        self._landed = self._segment.view[: plan.n_slots * 8].view(np.uint64)
        self._slots_at = plan.header_bytes
        self._plan = plan
        self._table = table = ExpertTable.from_dict(plan.table)
        self._reader = DirectReader(tuple(Path(p) for p in plan.shards), table)
        options: dict[str, Any] = {} if delay is None else {"delay": delay}
        self._queue = FetchQueue(
            self._reader, self._segment, self._on_landed, threads=plan.threads, **options
        )
        return self._segment.handle()

    def start(self, bells: tuple[str, ...]) -> None:
        """Begin to serve; `bells[i]` is the process that a job with bell i wakes."""
        fabric = self.fabric
        self._bells = bells
        self._from_driver = fabric.receiver("driver")
        self._to_driver = fabric.sender("driver")
        self._buffer = np.zeros(fabric.spec.slot_bytes, np.uint8)
        self._jobs_bell: dict[int, int] = {}
        self._announce: set[tuple[int, int]] = set()  # preloads, which the driver counts
        self._arm = self._open_arm()
        spin_us = 0.0 if self._arm is None else _SPIN_US
        self._loop = LoopThread(self, self.poll, self.status, spin_us)
        self._loop.start()

    def _open_arm(self) -> ProcessorArm | None:
        if self._plan.arm is None:
            return None
        assert self._segment is not None
        segment = ArmSegment(self._landed, self._segment.address + self._slots_at)
        return ProcessorArm(self._plan.arm, self._table, segment, self.fabric)

    def arm_cost(self) -> float:
        """Return the seconds that an expert of the largest class takes here, before any is read."""
        assert self._arm is not None
        return processor_s(self._arm.kernels, self._table, self._plan.slots_bytes)

    def poll(self) -> bool:
        """Take one message, or compute experts; returns whether there was something to do.

        Raises:
            StorageError: experts that are to be computed here do not come.
        """
        message = self._from_driver.try_recv(self._buffer)
        if message is None:
            return self._arm is not None and self._arm.advance()
        tag, nbytes = message
        assert self._queue is not None
        if tag == Tag.FETCH:
            records = self._buffer[:nbytes].view(READ).tolist()
            self._report_dropped(self._queue.submit([self._fetch(record) for record in records]))
        elif tag == Tag.ARM:
            assert self._arm is not None
            self._arm.take(self._buffer[:nbytes])
            self._arm.advance()
        elif tag == Tag.ABORT:
            assert self._arm is not None
            self._arm.give_up(STEP_ID.unpack_from(self._buffer.data)[0])
        elif tag == Tag.DROP:
            self._report_dropped(
                self._queue.cancel_prefetch(COUNT.unpack(self._buffer[:nbytes].tobytes())[0])
            )
        return True

    def _report_dropped(self, dropped: tuple[Fetch, ...]) -> None:
        """Tell the driver of prefetches that were never read."""
        if dropped:
            records = (DROPPED.pack(f.layer, f.expert, f.slot, f.generation) for f in dropped)
            self._send(Tag.DROPPED, b"".join(records))

    def _fetch(self, record: tuple[int, ...]) -> Fetch:
        address, generation, slot, layer, expert, priority, bell, _ = record
        self._jobs_bell[slot] = bell
        if priority == Priority.PRELOAD:
            self._announce.add((slot, generation))
        return Fetch(slot=slot, address=address + self._slots_at, generation=generation,
                     layer=layer, expert=expert,
                     priority=PREFETCH if priority in _IDLE else DEMAND,
                     keep=priority == Priority.BACKGROUND)  # fmt: skip

    def _on_landed(self, job: Fetch, error: StorageError | None) -> None:
        """Announce a job; runs on a reader thread."""
        if error is not None:
            log.error("%s: %s", self.name, error)
            failed = ReadFailed(layer=job.layer, expert=job.expert, slot=job.slot,
                                generation=job.generation, message=str(error),
                                prefetch=job.priority == PREFETCH)  # fmt: skip
            self._send(Tag.FAILED, encode(failed))
            return
        store_release_u64(self._landed, job.slot, job.generation)
        self.fabric.ring(self._bells[self._jobs_bell.get(job.slot, 0)])
        if (job.slot, job.generation) in self._announce:
            self._announce.discard((job.slot, job.generation))
            self._send(Tag.PRELOADED, COUNT.pack(1))

    def _send(self, tag: Tag, payload: bytes) -> None:
        with self._send_lock:  # rings have one producer; reader threads take turns
            try:
                self._to_driver.send(tag, payload, (), _SEND_BOUND_S)
            except ChannelError as error:
                log.error("%s: %s", self.name, error)

    def status(self) -> str:
        """Return one line for the log."""
        c = self.stats()
        demand, guessed = (
            f"{c[kind + '_bytes'] / 1e9:.2f} GB in {c[kind + '_open_s']:.1f} s"
            for kind in ("demand", "prefetch")
        )
        return (
            f"{c['reads']:,.0f} demand reads, {demand}  {c['prefetches']:,.0f} prefetches, "
            f"{guessed}  {c['failed']:,.0f} failed"
        )

    def stats(self) -> dict[str, float]:
        """Return counters of reads; bytes over open seconds is the rate that the drive gave."""
        if self._queue is None:
            return {}
        c = self._queue.counters
        return {
            "reads": c.jobs[DEMAND], "prefetches": c.jobs[PREFETCH], "bytes": sum(c.nbytes),
            "demand_bytes": c.nbytes[DEMAND], "demand_open_s": c.open_s[DEMAND],
            "prefetch_bytes": c.nbytes[PREFETCH], "prefetch_open_s": c.open_s[PREFETCH],
            "busy_s": sum(c.busy_s), "failed": c.failed, "dropped": c.dropped,
            "met_landed": c.met[2], "met_begun": c.met[1], "met_queued": c.met[0],
            "arm_experts": 0 if self._arm is None else self._arm.experts,
            "arm_compute_s": 0.0 if self._arm is None else self._arm.compute_ns / 1e9,
        }  # fmt: skip

    def stop(self) -> None:
        """End the loop and the readers."""
        if self._loop is not None:
            self._loop.stop()
        if self._queue is not None:
            self._readers_ended = self._queue.close()

    def leave(self) -> None:
        """Leave the fabric, the files and the segment, which a device may still have mapped."""
        super().leave()
        if self._reader is not None and self._readers_ended:
            self._reader.close()
        if self._segment is not None:
            self._segment.close()
