"""Shared memory for expert slots: one sealed memfd that several processes map.

A memfd has no name in any file system, so nothing is left behind when its processes die, and it
lives as long as one process has it open or mapped, so a killed creator does not take the bytes
from the others. All pages are allocated at creation and the size is sealed: a mapped byte can
never turn into a bus error.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from fomoe.errors import BudgetError, StorageError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# posix_fallocate of many GiB cannot be interrupted, so it runs in pieces.
_ALLOCATE_BYTES = 1 << 30


class SegmentHandle(TypedDict):
    """What another process of this machine needs to attach: file `fd` of process `pid`.

    `inode` tells the segment from another file that got the same number after the process died.
    """

    pid: int
    fd: int
    nbytes: int
    inode: int


class Segment:
    """A mapped shared segment; made by `create` or `attach`, not by the constructor.

    Attributes:
        nbytes: its size, a multiple of 4096.
        view: its bytes, writable, uint8 [nbytes], 4096-aligned.
        address: where `view` begins in this process.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self._fd = fd
        self._inode = os.fstat(fd).st_ino
        self._map = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.view: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self.address = int(self.view.ctypes.data)

    @classmethod
    def create(cls, nbytes: int) -> Segment:
        """Allocate a segment of `nbytes`, rounded up to pages; every byte is zero.

        Raises:
            BudgetError: the machine or the control group has not that much memory left.
            StorageError: the system refuses for another reason.
        """
        if nbytes <= 0:
            raise ValueError(f"a segment of {nbytes} bytes")
        nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        available = available_bytes()
        if nbytes > available:
            raise BudgetError("memory for expert slots", nbytes, available)
        fd = -1
        try:
            fd = os.memfd_create("fomoe-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, nbytes)
            for start in range(0, nbytes, _ALLOCATE_BYTES):
                os.posix_fallocate(fd, start, min(_ALLOCATE_BYTES, nbytes - start))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd, nbytes)
        except (OSError, ValueError) as error:
            if fd >= 0:
                os.close(fd)
            raise StorageError(
                f"{nbytes:,} bytes of shared memory for expert slots: {error}; "
                "give a smaller RAM budget"
            ) from error

    @classmethod
    def attach(cls, handle: SegmentHandle) -> Segment:
        """Map the segment that a process of this machine and user has open.

        Raises:
            StorageError: the process is gone, or the descriptor is not the segment.
        """
        path = Path(f"/proc/{handle['pid']}/fd/{handle['fd']}")
        where = f"shared segment {path}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise StorageError(
                f"{where} cannot be opened: {error.strerror}; its process has died or belongs to "
                "another user"
            ) from error
        try:
            status = os.fstat(fd)
            if (status.st_ino, status.st_size) != (handle["inode"], handle["nbytes"]):
                raise StorageError(f"{where} is another file now; attach with a new handle")
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise StorageError(f"{where} is not sealed, it could shrink while it is mapped")
            return cls(fd, handle["nbytes"])
        except (OSError, ValueError) as error:
            os.close(fd)
            raise StorageError(f"{where} cannot be mapped: {error}") from error
        except StorageError:
            os.close(fd)
            raise

    def handle(self) -> SegmentHandle:
        """What another process needs to attach while this one has the segment open."""
        if self._fd < 0:
            raise ValueError("the segment is closed")
        return {"pid": os.getpid(), "fd": self._fd, "nbytes": self.nbytes, "inode": self._inode}

    def close(self) -> None:
        """Close this process's descriptor and mapping; arrays cut from `view` keep the mapping."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        self.view = np.empty(0, np.uint8)
        # when somebody still holds a slice, the mapping goes with the last of them
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> Segment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that can be allocated without swapping, within all control groups' limits, in bytes.

    Args:
        root: where /proc and /sys are found.
    """
    available = 2**63 - 1
    for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            available = int(rest.split()[0]) * 1024
    return min([available, *(_left_in_group(group) for group in _memory_groups(root))])


def _memory_groups(root: Path) -> Iterator[Path]:
    """The folders of this process's memory control group (version 2 or 1) and its parents."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        # in a container the path may be the host's, of which only the top is to be seen
        group = top / place.lstrip("/")
        while group != top:
            yield group
            group = group.parent
        yield top


def _left_in_group(group: Path) -> int:
    """What a control group may still allocate; file pages give way, so they count as free."""
    limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
    used = _number(group / "memory.current", group / "memory.usage_in_bytes")
    if limit is None or used is None:
        return 2**63 - 1
    cache = 0
    with contextlib.suppress(OSError):
        for line in (group / "memory.stat").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "active_file"):
                cache += int(value)
    return max(limit - used + cache, 0)


def _number(*paths: Path) -> int | None:
    """The number in the first file that holds one; an unlimited group of version 2 says "max"."""
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            return int(path.read_text(encoding="ascii"))
    return None
