"""What the drive gives: O_DIRECT reads of a file, several in flight."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fomoe.storage.rates import timed_reads

IN_FLIGHT = 4


def direct_rates(path: Path, seconds: float = 1.0) -> dict[str, float]:
    """Return bytes per second of reads the size of an expert's part, and of a whole sweep."""
    size = path.stat().st_size
    random = np.random.default_rng(0).permutation(size // (2 << 20)) * (2 << 20)
    sequential = range(0, size - (8 << 20), 8 << 20)
    return {
        "random": timed_reads(path, random.tolist(), 2 << 20, seconds, IN_FLIGHT),
        "sequential": timed_reads(path, sequential, 8 << 20, seconds, IN_FLIGHT),
    }


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
