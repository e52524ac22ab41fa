"""What the drive of a file can deliver, to set reading speeds beside."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np

from fomoe.errors import StorageError
from fomoe.storage.fetch import Fetch, FetchQueue
from fomoe.storage.reader import DirectReader
from fomoe.storage.segment import Segment

_REQUEST_BYTES = 4 << 20
_MOST_BYTES = 2 << 30
_BURST = 4
_READ_BOUND_S = 10.0
_LEAST_S = 1e-7  # of a read that a cache below us answers


def direct_read_rate(path: Path, seconds: float = 1.0, depth: int = 4) -> float:
    """Return bytes per second of O_DIRECT reads in file order, `depth` of 4 MiB under way.

    Reads for about `seconds`, at most 2 GiB, from a third of the file on (and around its end), so
    that a header in the page cache plays no part.

    Raises:
        StorageError: the file cannot be read past the page cache, or is shorter than 4 MiB.
    """
    size = path.stat().st_size // _REQUEST_BYTES * _REQUEST_BYTES
    if size == 0:
        raise StorageError(f"{path} has fewer than {_REQUEST_BYTES:,} bytes; too few to time")
    start = size // 3 // _REQUEST_BYTES * _REQUEST_BYTES
    most = min(size, _MOST_BYTES)
    offsets = [(start + at) % size for at in range(0, most, _REQUEST_BYTES)]
    return timed_reads(path, offsets, _REQUEST_BYTES, seconds, depth)


def timed_reads(
    path: Path, offsets: Sequence[int], nbytes: int, seconds: float, depth: int
) -> float:
    """Return bytes per second of O_DIRECT reads of `nbytes` at `offsets`, in turn.

    `depth` of them are under way; none begins after `seconds`. Offsets and `nbytes` are whole
    pages.

    Raises:
        StorageError: the file cannot be read past the page cache.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        raise StorageError(f"{path}: no direct reads ({error.strerror})") from error
    lock, left = threading.Lock(), iter(offsets)
    deadline = time.monotonic() + seconds

    def read() -> int:
        buffer, total = mmap.mmap(-1, nbytes), 0
        while time.monotonic() < deadline:
            with lock:
                offset = next(left, None)
            if offset is None:
                break
            total += os.preadv(fd, [buffer], offset)
        return total

    try:
        started = time.monotonic()
        with ThreadPoolExecutor(depth) as threads:
            total = sum(f.result() for f in [threads.submit(read) for _ in range(depth)])
        return total / (time.monotonic() - started)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}; check the drive with smartctl") from error
    finally:
        os.close(fd)


def expert_read_times(reader: DirectReader, seconds: float = 1.0) -> tuple[float, float]:
    """Measure reads of experts as a run does them: through a queue, in bursts, in random order.

    Returns:
        Seconds by which a burst of four takes longer than one of one, for each more, and the
        seconds of the one less that: what each more costs, and what comes on top of a burst.

    Raises:
        StorageError: a read failed or took longer than 10 s.
    """
    layers = reader.table.layers
    slot_bytes = max(reader.table.slot_bytes(layer) for layer in layers)
    with (
        Segment.create(_BURST * slot_bytes) as segment,
        closing(_Bursts(reader, segment, slot_bytes)) as bursts,
    ):
        deadline = time.monotonic() + seconds
        singles, many = [bursts.read(1)], [bursts.read(_BURST)]
        while time.monotonic() < deadline:
            singles.append(bursts.read(1))
            many.append(bursts.read(_BURST))
    one = float(np.mean(singles))
    each = max((float(np.mean(many)) - one) / (_BURST - 1), _LEAST_S)
    return each, max(0.0, one - each)


class _Bursts:
    """Reads of random experts through a queue, several at once."""

    def __init__(self, reader: DirectReader, segment: Segment, slot_bytes: int) -> None:
        self._table, self._slot_bytes = reader.table, slot_bytes
        self._rng, self._generations = np.random.default_rng(0), itertools.count(1)
        self._landed: SimpleQueue[StorageError | None] = SimpleQueue()
        self._queue = FetchQueue(reader, segment, lambda _, error: self._landed.put(error))

    def close(self) -> None:
        """End the queue, which must come before its segment's end."""
        self._queue.close()

    def read(self, size: int) -> float:
        """Return the seconds that `size` experts take together; StorageError where one fails."""
        layers = self._rng.choice(np.array(self._table.layers), size).tolist()
        fetches = [
            Fetch(
                slot=i, address=i * self._slot_bytes, generation=next(self._generations),
                layer=layer, expert=int(self._rng.integers(self._table.n_experts)),
            )
            for i, layer in enumerate(layers)
        ]  # fmt: skip
        started = time.perf_counter()
        self._queue.submit(fetches)
        for _ in fetches:
            try:
                error = self._landed.get(timeout=_READ_BOUND_S)
            except Empty:
                raise StorageError(f"a read took longer than {_READ_BOUND_S} s") from None
            if error is not None:
                raise error
        return time.perf_counter() - started
