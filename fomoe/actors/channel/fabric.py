"""The shared memory of one box: rings, bells and arenas between the processes of an engine."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel._channel import ABSENT, ALIVE, Inlet, Layout, Plane, Ring
from fomoe.actors.channel.peers import PeerWatcher, boot_id, starttime
from fomoe.actors.channel.ports import SLICE_S, Receiver, RingReceiver, RingSender, Sender
from fomoe.actors.channel.spec import FabricHandle, FabricSpec
from fomoe.errors import BudgetError, ChannelError
from fomoe.storage.segment import available_bytes

# Nobody can shrink the file under a mapping (SIGBUS) or lift the seals.
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Remote(Protocol):
    """What a connection to a peer on another box offers to its fabric."""

    def sender(self) -> Sender:
        """The sending end."""
        ...

    def receiver(self) -> Receiver:
        """The receiving end; messages arrive in the local ring of the same name."""
        ...

    def ring(self) -> None:
        """Rings the peer's bell."""
        ...

    def close(self) -> None:
        """Ends the connection; the peer takes it as a death."""
        ...


class Fabric:
    """One process' place in the shared memory of its box.

    Made by `create` in one process of a box and by `attach` in the others; every process has one.
    Nothing has a name in the file system, and the memory lives as long as one process maps it,
    so a killed process leaves nothing behind. A fabric in which a process died is not repaired:
    the survivors make a new one.
    """

    def __init__(self, spec: FabricSpec, me: str, fd: int, handle: FabricHandle) -> None:
        """Maps and checks `fd`, which it owns from now on; use `create` or `attach`."""
        self.spec = spec
        self.me = me
        self._fd = fd
        self._handle = handle
        self._row = spec.process_index(me)
        self._rows = {name: row for row, name in enumerate(spec.processes)}
        layout = _layout(spec)
        self._memory = mmap.mmap(fd, layout.total_bytes)
        self._plane = Plane(self._memory, layout)
        self._arenas = {
            name: np.frombuffer(self._memory, np.uint8, nbytes, offset)
            for (name, nbytes), offset in zip(spec.arenas, layout.arena_offsets, strict=True)
        }
        self._senders: dict[str, Sender] = {}
        self._receivers: dict[str, Receiver] = {}
        self._remotes: dict[str, Remote] = {}
        self._closed = False

    @classmethod
    def create(cls, spec: FabricSpec, me: str) -> Fabric:
        """Makes the fabric of this box and joins it as process `me`.

        Raises BudgetError when there is too little memory, ChannelError when it cannot be made.
        """
        nbytes = _layout(spec).total_bytes
        fabric_id = secrets.token_bytes(16)
        fd = _reserve(nbytes)
        handle = FabricHandle(
            pid=os.getpid(),
            starttime=_own_starttime(),
            fd=fd,
            boot_id=boot_id(),
            fabric_id=fabric_id.hex(),
            spec=spec.to_dict(),
        )
        try:
            fabric = cls(spec, me, fd, handle)
        except BaseException:
            os.close(fd)
            raise
        ends = [(spec.process_index(frm), spec.process_index(to)) for frm, to in spec.rings]
        fabric._plane.format(fabric_id, spec.digest(), ends)
        fabric._join()
        return fabric

    @classmethod
    def attach(cls, handle: Mapping[str, Any], me: str) -> Fabric:
        """Joins the fabric of another process of this box and user as process `me`.

        Raises ChannelError when the fabric is on another box or boot, its creator is gone, it is
        not what the handle says, or `me` has been taken.
        """
        spec = FabricSpec.from_dict(handle["spec"])
        fd = open_memory(handle)
        try:
            if os.fstat(fd).st_size != _layout(spec).total_bytes:
                raise ChannelError(f"fabric {handle['fabric_id']}: it was made for another spec")
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
                raise ChannelError(f"fabric {handle['fabric_id']}: its memory is not sealed")
            fabric = cls(spec, me, fd, FabricHandle(**handle))  # type: ignore[typeddict-item]
            refusal = fabric._plane.refusal(bytes.fromhex(handle["fabric_id"]), spec.digest())
            if refusal is not None:
                raise ChannelError(f"fabric {handle['fabric_id']}: {refusal}")
            fabric._join()
        except BaseException:
            os.close(fd)
            raise
        return fabric

    def _join(self) -> None:
        state = self._plane.join(self._row, os.getpid(), _own_starttime())
        if state != ABSENT:
            pid = self._plane.describe(self._row)[1]
            raise ChannelError(
                f"process {self.me!r} of fabric {self.fabric_id} was taken by pid {pid}; "
                "make a new fabric after a death"
            )
        others = set(range(len(self.spec.processes))) - {self._row}
        plane = self._plane  # not self: the watcher must not keep a dropped fabric alive
        self._watcher = PeerWatcher(plane, others, lambda row: plane.leave(row, True))
        self._watcher.start()

    @property
    def fabric_id(self) -> str:
        """Identity of this memory (hex); processes with equal ids share it."""
        return self._handle["fabric_id"]

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def handle(self) -> FabricHandle:
        """What another process of this box needs to attach while the creator keeps it open."""
        return self._handle

    def sender(self, to: str) -> Sender:
        """The sending end of the ring to `to`; always the same object."""
        ring = self._ring_index(self.me, to)
        if to not in self._senders:
            remote = self._remotes.get(to)
            self._senders[to] = (
                RingSender(Ring(self._plane, ring), to) if remote is None else remote.sender()
            )
        return self._senders[to]

    def receiver(self, frm: str) -> Receiver:
        """The receiving end of the ring from `frm`; always the same object."""
        ring = self._ring_index(frm, self.me)
        if frm not in self._receivers:
            remote = self._remotes.get(frm)
            self._receivers[frm] = (
                RingReceiver(Ring(self._plane, ring), frm) if remote is None else remote.receiver()
            )
        return self._receivers[frm]

    def _ring_index(self, frm: str, to: str) -> int:
        if self._closed:
            raise ChannelError(f"{self.me} has closed its fabric")
        return self.spec.ring_index(frm, to)

    def arena(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of an arena, starting on a page; valid as long as the array is kept."""
        return self._arenas[name]

    def bell(self) -> int:
        """My bell's count; read it before the rings are looked through, then `wait` on it."""
        return self._plane.bell(self._row)

    def wait(self, bell_value: int, spin_us: float, timeout_ms: float) -> bool:
        """Waits till my bell differs from `bell_value`; False after `timeout_ms` milliseconds.

        Spins (yielding) for `spin_us` microseconds before it sleeps; 0 sleeps at once. True says
        only that something may have happened: a message, a death, or a ring of the bell.
        """
        deadline = time.monotonic() + timeout_ms * 1e-3
        left_ms = timeout_ms
        spin = spin_us
        while not self._plane.wait(self._row, bell_value, spin, min(left_ms, SLICE_S * 1e3)):
            left_ms = (deadline - time.monotonic()) * 1e3
            spin = 0.0
            if left_ms <= 0:
                return False
        return True

    def ring(self, process: str) -> None:
        """Rings the bell of `process` without a message."""
        remote = self._remotes.get(process)
        if remote is None:
            self._plane.ring(self._rows[process])
        else:
            remote.ring()

    def peer_dead(self, process: str) -> bool:
        """Whether `process` has ended, was killed, closed its fabric or lost its connection."""
        return self._plane.gone(self._rows[process])

    def attached(self, process: str) -> bool:
        """Whether `process` can be reached: it joined this fabric or is connected to me."""
        if self.peer_dead(process):
            return False
        joined = self._plane.describe(self._rows[process])[0] == ALIVE
        return joined or process in self._remotes

    def adopt(self, process: str, remote: Remote) -> None:
        """Routes messages to and from `process` through a connection from now on."""
        if process in self._senders or process in self._receivers:
            raise ChannelError(f"{process} was connected after its ports were handed out")
        self._remotes[process] = remote

    def expect_elsewhere(self, processes: Iterable[str]) -> None:
        """Notes that `processes` live on other boxes and will never attach here."""
        self._watcher.ignore(self._rows[process] for process in processes)

    def inbox(self, frm: str) -> Ring:
        """The local ring that a connection fills with the messages of remote peer `frm`."""
        return Ring(self._plane, self.spec.ring_index(frm, self.me))

    def inlet(self, inbox: Ring | None, fd: int) -> Inlet:
        """What reads frames from socket `fd` into `inbox` and the arenas."""
        return Inlet(self._plane, inbox, self._row, fd)

    def lose(self, process: str) -> None:
        """Notes that the connection to a remote peer is gone, and wakes my waiters."""
        self._plane.lose(self._rows[process])

    def close(self) -> None:
        """Leaves the fabric: peers see me as gone, the arrays of `arena` stay valid here."""
        if self._closed:
            return
        self._closed = True
        for remote in self._remotes.values():
            remote.close()
        self._plane.leave(self._row, False)
        self._watcher.stop()
        os.close(self._fd)
        # Ports and connections refer back to this object; the memory goes with the last user.
        self._senders.clear()
        self._receivers.clear()
        self._remotes.clear()

    def __enter__(self) -> Fabric:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_memory(handle: Mapping[str, Any]) -> int:
    """Opens the memory that a handle names; the caller closes the descriptor.

    Raises ChannelError when this process cannot reach it: another box, boot, pid namespace or
    user, or the creator is gone.
    """
    pid, fd = int(handle["pid"]), int(handle["fd"])
    if handle["boot_id"] != boot_id():
        raise ChannelError(f"fabric {handle['fabric_id']} is on another box or from before a boot")
    if starttime(pid) != handle["starttime"]:
        raise ChannelError(
            f"fabric {handle['fabric_id']}: its creator, pid {pid}, is gone or not visible from "
            "here (another pid namespace)"
        )
    try:
        return os.open(Path(f"/proc/{pid}/fd/{fd}"), os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = (
            "run both processes as one user"
            if error.errno in (errno.EACCES, errno.EPERM)
            else "its creator closed it"
        )
        raise ChannelError(
            f"fabric {handle['fabric_id']}: descriptor {fd} of pid {pid}: {error.strerror}; {hint}"
        ) from error


def _reserve(nbytes: int) -> int:
    """A sealed, nameless memory file whose pages are all there."""
    available = available_bytes()
    if nbytes > available:  # asked first: the kernel would kill processes to make room
        raise BudgetError("shared memory between processes", nbytes, available)
    fd = os.memfd_create("fomoe-fabric", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Reserved now: a page that is missing later would end a process with SIGBUS.
        os.posix_fallocate(fd, 0, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        os.close(fd)
        raise ChannelError(
            f"cannot reserve {nbytes:,} bytes of shared memory: {error.strerror}; "
            "free memory or use smaller arenas"
        ) from error
    return fd


def _layout(spec: FabricSpec) -> Layout:
    arenas = [nbytes for _, nbytes in spec.arenas]
    return Layout(len(spec.processes), len(spec.rings), arenas, spec.ring_slots, spec.slot_bytes)


def _own_starttime() -> int:
    started = starttime(os.getpid())
    if started is None:
        raise ChannelError("/proc is not mounted; the channel needs it")
    return started
