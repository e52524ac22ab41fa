"""What the drive gives: O_DIRECT reads of a file, several in flight."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

PAGE = 4096
IN_FLIGHT = 4


def direct_rates(path: Path, seconds: float = 1.0) -> dict[str, float]:
    """Return bytes per second of reads the size of an expert's part, and of a whole sweep."""
    size = path.stat().st_size
    random = np.random.default_rng(0).permutation(size // (2 << 20)) * (2 << 20)
    return {
        "random": _rate(path, random.tolist(), 2 << 20, seconds),
        "sequential": _rate(path, list(range(0, size - (8 << 20), 8 << 20)), 8 << 20, seconds),
    }


def _rate(path: Path, offsets: list[int], piece: int, seconds: float) -> float:
    """Read pieces at offsets from IN_FLIGHT threads until time is up."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffers = [mmap.mmap(-1, piece) for _ in range(IN_FLIGHT)]
    start = time.perf_counter()

    def read(worker: int) -> int:
        done = 0
        for offset in offsets[worker::IN_FLIGHT]:
            if time.perf_counter() - start > seconds:
                break
            done += os.preadv(fd, [buffers[worker]], offset)
        return done

    try:
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            done = sum(pool.map(read, range(IN_FLIGHT)))
    finally:
        os.close(fd)
    return done / (time.perf_counter() - start)


@contextmanager
def read_ahead(path: Path, kib: int | None) -> Iterator[None]:
    """Set the kernel's read-ahead of the drive that holds `path` for a while (needs root)."""
    if kib is None:
        yield
        return
    number = path.stat().st_dev
    link = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    drive = link if (link / "queue").exists() else link.parent
    setting = drive / "queue" / "read_ahead_kb"
    before = setting.read_text()
    setting.write_text(str(kib))
    try:
        yield
    finally:
        setting.write_text(before)
