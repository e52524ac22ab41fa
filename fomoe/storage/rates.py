"""What the drive of a file can deliver, to set reading speeds beside."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fomoe.errors import StorageError

_REQUEST_BYTES = 4 << 20
_MOST_BYTES = 2 << 30


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
