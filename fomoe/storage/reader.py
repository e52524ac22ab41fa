"""Reads experts from the model's files straight into their slots, past the page cache.

A direct read moves whole 4096-byte pages to aligned memory, so each part is read with the pages
around it into the part's area of the slot (the layout is `ExpertTable`'s). Files are read, never
mapped: a file that shrinks gives an error here, where a mapping would kill the process.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from fomoe.errors import StorageError
from fomoe.gguf.extents import PAGE_BYTES, ExpertTable
from fomoe.storage.pieces import Piece, cut, parts_of

_log = logging.getLogger(__name__)

TRIES = 4  # one read and three repetitions
_BACKOFF_S = 0.005  # then 4 and 16 times as long
_RETRIED = frozenset({errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ENODATA})

Pread = Callable[[int, memoryview, int], int]


def _pread(fd: int, buffer: memoryview, offset: int) -> int:
    return os.preadv(fd, [buffer], offset)


@dataclass(frozen=True, slots=True)
class _Identity:
    """What must not change about a file that is in use."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(slots=True)
class _File:
    """One open file of the model."""

    path: Path
    fd: int
    direct: bool
    identity: _Identity


class DirectReader:
    """Reads experts by (layer, expert); threads may share one reader.

    Attributes:
        retries: repeated reads so far.

    Args:
        shards: the files of the model, in the order that `table` counts them.
        table: where the experts lie.
        direct: use O_DIRECT where the file system allows it.
        pread: reads into a buffer at an offset, returns the number of bytes (for fault tests).
        sleep: waits between two tries, seconds.

    Raises:
        StorageError: a file is missing or has not the size that `table` was made with.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        table: ExpertTable,
        *,
        direct: bool = True,
        pread: Pread = _pread,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if len(shards) != len(table.shard_bytes):
            raise StorageError(f"{len(shards)} files given, the model has {len(table.shard_bytes)}")
        self._table = table
        self._parts = {layer: parts_of(table, layer) for layer in table.layers}
        self._pread = pread
        self._sleep = sleep
        self._files: list[_File] = []
        self._lock = threading.Lock()
        self.retries = 0
        try:
            for path, nbytes in zip(shards, table.shard_bytes, strict=True):
                self._files.append(_open(Path(path), nbytes, direct))
        except StorageError:
            self.close()
            raise

    @property
    def table(self) -> ExpertTable:
        """Where the experts lie."""
        return self._table

    @property
    def direct(self) -> tuple[bool, ...]:
        """For each file, whether it is read past the page cache."""
        return tuple(file.direct for file in self._files)

    def read_expert(self, layer: int, expert: int, dst: npt.NDArray[np.uint8] | memoryview) -> int:
        """Read one expert into its slot.

        Args:
            layer: the layer.
            expert: the expert.
            dst: the slot, at least `table.slot_bytes(layer)` bytes; page-aligned, or else the
                kernel refuses direct reads.

        Returns:
            The expert's true bytes, without the pages around them.

        Raises:
            StorageError: names file, tensor and offset.
        """
        slot = (dst.data if isinstance(dst, np.ndarray) else dst).cast("B")
        need = self._table.slot_bytes(layer) if layer in self._parts else 0
        if len(slot) < need:
            raise ValueError(f"a slot of {len(slot)} bytes, {need} are needed")
        return sum(
            self.read_piece(piece, expert, slot) for piece in self.pieces(layer, expert, need)
        )

    def pieces(self, layer: int, expert: int, most_bytes: int) -> tuple[Piece, ...]:
        """Return the read of an expert in pieces of at most `most_bytes`; see `pieces.cut`."""
        parts = self._parts.get(layer)
        if parts is None or not 0 <= expert < self._table.n_experts:
            raise IndexError(f"layer {layer}, expert {expert} is not in the model")
        return cut(parts, expert, most_bytes)

    def read_piece(self, piece: Piece, expert: int, slot: memoryview) -> int:
        """Read a piece of an expert into its slot; returns its true bytes.

        Raises:
            StorageError: names file, tensor and offset.
        """
        total = 0
        for span in piece:
            part = span.part
            try:
                area = slot[span.at : part.area + part.area_bytes]
                self._read_pages(self._files[part.shard], span.offset, span.nbytes, area)
            except StorageError as error:
                raise StorageError(f"{part.name}, expert {expert}: {error}") from error.__cause__
            total += span.nbytes
        return total

    def close(self) -> None:
        """Close the files; no read may be running."""
        while self._files:
            os.close(self._files.pop().fd)

    def __enter__(self) -> DirectReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read_pages(self, file: _File, offset: int, nbytes: int, area: memoryview) -> None:
        """Fill `area` from the page before `offset`; bytes behind the file's end stay as are."""
        lead = offset % PAGE_BYTES
        start = offset - lead
        wanted = lead + nbytes
        area = area[: -(-wanted // PAGE_BYTES) * PAGE_BYTES]
        done = 0
        failures = 0
        while done < wanted:
            direct = file.direct
            try:
                got = self._pread(file.fd, area[done:], start + done)
            except OSError as error:
                if direct and error.errno == errno.EINVAL:
                    _fall_back(file, area)
                    continue
                failures += 1
                self._pause_or_refuse(file, start + done, error, failures)
                continue
            end = done + got
            if direct and end < wanted:
                # a direct read goes on at a page, so a page that came in part is read again
                end -= end % PAGE_BYTES
            if end <= done:
                missing = start + wanted - os.fstat(file.fd).st_size
                if missing > 0:
                    _refuse(file, start + done, f"the file ends {missing:,} bytes early", None)
                failures += 1
                short = OSError(errno.EIO, f"only {got:,} of {wanted - done:,} bytes came")
                self._pause_or_refuse(file, start + done, short, failures)
            done = max(done, end)

    def _pause_or_refuse(self, file: _File, offset: int, error: OSError, failures: int) -> None:
        """Wait before another try, or raise when there is none left or it would not help."""
        if error.errno not in _RETRIED:
            _refuse(file, offset, error.strerror, error)
        if failures >= TRIES:
            _refuse(file, offset, f"{error.strerror}, {TRIES} tries", error)
        with self._lock:
            self.retries += 1
        self._sleep(_BACKOFF_S * 4.0 ** (failures - 1))


def _open(path: Path, nbytes: int, direct: bool) -> _File:
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise StorageError(f"{path} is not a regular file; give the model's own files")
        fd, is_direct = _open_direct(path, flags) if direct else (os.open(path, flags), False)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be opened: {error.strerror}; it must be a readable file of "
            f"{nbytes:,} bytes"
        ) from error
    identity = _Identity.of(os.fstat(fd))
    if identity.size != nbytes:
        os.close(fd)
        raise StorageError(
            f"{path} has {identity.size:,} bytes instead of {nbytes:,}; it was changed or is "
            "another copy, restore it"
        )
    return _File(path, fd, is_direct, identity)


def _open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """Open with O_DIRECT, or without it where the file system refuses."""
    try:
        return os.open(path, flags | os.O_DIRECT), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _log.warning("%s: the file system has no direct reads, the page cache is used", path)
        return os.open(path, flags), False


def _fall_back(file: _File, area: memoryview) -> None:
    """Read `file` through the page cache from now on, on the same open file."""
    address = np.frombuffer(area, np.uint8).ctypes.data
    if address % PAGE_BYTES:
        raise ValueError(f"a slot at address {address:#x} is not aligned to {PAGE_BYTES} bytes")
    flags = fcntl.fcntl(file.fd, fcntl.F_GETFL)
    fcntl.fcntl(file.fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    file.direct = False
    _log.warning("%s: a direct read was refused, the page cache is used", file.path)


def _change(file: _File) -> str:
    """What happened to a file since it was opened; empty when nothing did."""
    was = file.identity
    now = _Identity.of(os.fstat(file.fd))
    if now.size != was.size:
        return f"the file had {was.size:,} bytes and has {now.size:,} now"
    if now.mtime_ns != was.mtime_ns:
        return "the file was written to"
    try:
        there = _Identity.of(file.path.stat())
    except OSError as error:
        return f"the file is gone from its place ({error.strerror})"
    if (there.device, there.inode) != (was.device, was.inode):
        return "another file has taken its place"
    return ""


def _refuse(file: _File, offset: int, problem: str | None, cause: OSError | None) -> NoReturn:
    change = _change(file)
    what = f"{problem} ({change})" if change else problem
    hint = "restore the file and start again" if change else "check the drive with smartctl"
    raise StorageError(f"{file.path} at byte {offset:,}: {what}; {hint}") from cause
