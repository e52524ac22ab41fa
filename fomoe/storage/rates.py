"""What the drive of a file can deliver, to set reading speeds beside."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fomoe.errors import StorageError
from fomoe.storage.fetch import Fetch, FetchQueue
from fomoe.storage.reader import DirectReader
from fomoe.storage.segment import Segment

_REQUEST_BYTES = 4 << 20
_MOST_BYTES = 2 << 30
_BURST = 4
_READ_BOUND_S = 10.0


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
        StorageError: a read failed.
    """
    table = reader.table
    slot_bytes = max(table.slot_bytes(layer) for layer in table.layers)
    rng, landed, errors = np.random.default_rng(0), threading.Semaphore(0), list[StorageError]()

    def on_landed(_: Fetch, error: StorageError | None) -> None:
        if error is not None:
            errors.append(error)
        landed.release()

    counter = itertools.count(1)
    with Segment.create(_BURST * slot_bytes) as segment:
        queue = FetchQueue(reader, segment, on_landed)

        def burst(size: int) -> float:
            layers = rng.choice(np.array(table.layers), size).tolist()
            fetches = [
                Fetch(
                    slot=i,
                    address=i * slot_bytes,
                    generation=next(counter),
                    layer=layer,
                    expert=int(rng.integers(table.n_experts)),
                )
                for i, layer in enumerate(layers)
            ]
            started = time.perf_counter()
            queue.submit(fetches)
            for _ in fetches:
                if not landed.acquire(timeout=_READ_BOUND_S):
                    raise StorageError(f"a read took longer than {_READ_BOUND_S} s")
            return time.perf_counter() - started

        deadline, singles, bursts = time.monotonic() + seconds, [burst(1)], [burst(_BURST)]
        while time.monotonic() < deadline:
            singles.append(burst(1))
            bursts.append(burst(_BURST))
        queue.close()
    if errors:
        raise errors[0]
    one, many = float(np.mean(singles)), float(np.mean(bursts))
    each = max((many - one) / (_BURST - 1), 1e-7)
    return each, max(0.0, one - each)
