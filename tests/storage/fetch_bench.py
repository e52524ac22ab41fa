"""A fetch queue under observation, for its tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from expert_files import Model

from fomoe.errors import StorageError
from fomoe.storage.fetch import Fetch, FetchQueue
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


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
