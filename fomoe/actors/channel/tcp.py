"""The twin of a shared-memory ring for a peer on another box: one authenticated socket per pair.

Frames go out from the thread that sends (no writer thread); a reader thread puts what comes in
into the local arenas and the local ring, so that receivers and bells work as for a peer next door.
A sender may have `ring_slots` messages on the way that the other end has not consumed (credit), so
the reader always finds room and never stops reading: both directions make progress.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time

import numpy as np

from fomoe.actors.channel.fabric import Fabric
from fomoe.actors.channel.ports import SLICE_S, Buffer, Receiver, Regions, Sender, WritableBuffer
from fomoe.actors.channel.wire import Kind, MessagePacker, pack_header
from fomoe.errors import ChannelError, PeerDeadError, PeerStalledError

log = logging.getLogger(__name__)

# A quiet connection carries a pulse this often: the kernel can only notice a lost box
# (USER_TIMEOUT_MS without an acknowledgement) while something is on its way.
PULSE_S = 0.2
USER_TIMEOUT_MS = 1000
# A living kernel whose process neither reads nor pulses for this long counts as dead. It is longer
# than a second because a process that is busy loading may hold the interpreter for that long.
SILENCE_S = 5.0
GOODBYE_S = 1.0  # for the peer to take note that this end has closed


class Connection:
    """One socket to one remote peer, both directions; owns the socket."""

    def __init__(self, sock: socket.socket, fabric: Fabric, peer: str) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        self.peer = peer
        self.fabric = fabric
        self.inbox = fabric.inbox(peer) if (peer, fabric.me) in fabric.spec.rings else None
        self.inlet = fabric.inlet(self.inbox, sock.fileno())
        self._packer = MessagePacker(fabric.spec)
        self._sock = sock
        self._write_lock = threading.Lock()
        self._rest = memoryview(b"")  # of a pulse that the socket did not take whole
        self._told = 0  # consumed count that the peer knows
        self._last_write = time.monotonic()
        self._closing = False
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)
        self._reader = threading.Thread(target=self._run, name=f"fomoe-tcp-{peer}", daemon=True)

    def start(self) -> None:
        """Begins to read."""
        self._reader.start()

    def sender(self) -> Sender:
        """See `Remote`."""
        return TcpSender(self)

    def receiver(self) -> Receiver:
        """See `Remote`."""
        return TcpReceiver(self)

    def ring(self) -> None:
        """See `Remote`; a peer that is gone is not rung."""
        with contextlib.suppress(ChannelError), self._write_lock:
            self._write([self._header(Kind.BELL)])

    def close(self) -> None:
        """Lets the peer read what was sent, then ends; the peer takes it as a death."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        self._reader.join(GOODBYE_S)
        self._break()

    def post(self, tag: int, payload: Buffer, regions: Regions) -> None:
        """Writes one message; the caller has made sure of credit."""
        body = payload.data if isinstance(payload, np.ndarray) else memoryview(payload)
        table = self._packer.check(tag, body.nbytes, regions)
        parts = [body, *(self._region(*region) for region in regions)]
        flat = [part.cast("B") for part in parts if part.nbytes]
        with self._write_lock:
            self._told = self._consumed()
            # Counted before the write: the peer may answer before the write returns.
            position = self.inlet.count_sent()
            head = self._packer.pack(tag, body.nbytes, table, position, self._told)
            self._write([memoryview(head), *flat])

    def give_credit(self) -> None:
        """Tells the peer that slots are free again, once it may have run half out of them."""
        if self._consumed() - self._told < (self.fabric.spec.ring_slots + 1) // 2:
            return
        with contextlib.suppress(ChannelError), self._write_lock:
            self._write([self._header(Kind.PULSE)])

    def _consumed(self) -> int:
        return 0 if self.inbox is None else self.inbox.consumed()

    def _header(self, kind: Kind) -> memoryview:
        self._told = self._consumed()
        return memoryview(pack_header(kind, self._told))

    def _region(self, arena: str, offset: int, nbytes: int) -> memoryview:
        return self.fabric.arena(arena)[offset : offset + nbytes].data

    def _write(self, parts: list[memoryview]) -> None:
        """Writes a whole frame, holding the lock; a socket that takes no byte for long is dead."""
        parts = [self._rest, *parts] if self._rest else parts
        self._rest = memoryview(b"")
        while parts := self._write_some(parts):
            waited = time.monotonic() - self._last_write
            if self.fabric.peer_dead(self.peer):
                raise PeerDeadError(self.peer)
            if waited > SILENCE_S:
                self._break()  # half a frame is out: nothing may follow it
                raise PeerStalledError(self.peer, waited)
            self._writable.poll(SLICE_S * 1e3)

    def _write_some(self, parts: list[memoryview]) -> list[memoryview]:
        try:
            left = _skip(parts, self._sock.sendmsg(parts))
        except BlockingIOError:
            return parts
        except OSError as error:
            self._break()
            raise PeerDeadError(self.peer) from error
        self._last_write = time.monotonic()
        return left

    def _pulse(self) -> None:
        """Writes a pulse if the connection was quiet; never waits."""
        if time.monotonic() - self._last_write < PULSE_S:
            return
        if self._write_lock.acquire(blocking=False):
            try:
                left = self._write_some([self._rest or self._header(Kind.PULSE)])
                # Kept, because the count in it passes for told.
                self._rest = left[0] if left else memoryview(b"")
            except PeerDeadError:
                pass  # the reader goes on to what the peer sent before
            finally:
                self._write_lock.release()

    def _break(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            while self.inlet.pump(PULSE_S * 1e3):
                self._pulse()
                if self.inlet.quiet_s() > SILENCE_S:
                    raise ChannelError(f"nothing was heard for {SILENCE_S:.1f} s")
        except ChannelError as error:
            if not self._closing:
                log.warning("connection to %s ended: %s", self.peer, error)
        finally:
            self.fabric.lose(self.peer)
            self.inlet.wake()
            self._break()
            with self._write_lock:
                self._sock.close()


def _skip(parts: list[memoryview], nbytes: int) -> list[memoryview]:
    """What is left of `parts` after their first `nbytes` bytes."""
    for i, part in enumerate(parts):
        if nbytes < part.nbytes:
            return [part[nbytes:], *parts[i + 1 :]]
        nbytes -= part.nbytes
    return []


class TcpSender:
    """Sender to a peer on another box.

    A frame that was begun is finished: `try_send` may take as long as the network needs for it,
    and raises PeerStalledError when that takes no byte for SILENCE_S seconds.
    """

    def __init__(self, connection: Connection) -> None:
        self.peer = connection.peer
        self._connection = connection
        self._slots = connection.fabric.spec.ring_slots

    def try_send(self, tag: int, payload: Buffer, regions: Regions = ()) -> bool:
        """See `Sender`; the bytes of `regions` go along."""
        connection = self._connection
        if connection.fabric.peer_dead(self.peer):
            raise PeerDeadError(self.peer)
        if connection.inlet.in_flight() >= self._slots:
            return False
        connection.post(tag, payload, regions)
        return True

    def send(self, tag: int, payload: Buffer, regions: Regions = (), timeout_s: float = 5) -> None:
        """See `Sender`."""
        started = time.monotonic()
        while not self.try_send(tag, payload, regions):
            left = started + timeout_s - time.monotonic()
            if left <= 0:
                raise PeerStalledError(self.peer, time.monotonic() - started)
            self._connection.inlet.wait_credit(self._slots, min(left, SLICE_S) * 1e3)


class TcpReceiver:
    """Receiver from a peer on another box: the local ring, and credit back for what was taken."""

    def __init__(self, connection: Connection) -> None:
        if connection.inbox is None:
            raise ChannelError(f"there is no ring from {connection.peer}")
        self.peer = connection.peer
        self._connection = connection
        self._ring = connection.inbox

    def try_recv(self, buffer: WritableBuffer) -> tuple[int, int] | None:
        """See `Receiver`."""
        message = self._ring.try_recv(buffer)
        if message is None and self._ring.producer_gone():
            # Looked at again: the last message may have come between the two looks above.
            message = self._ring.try_recv(buffer)
            if message is None:
                raise PeerDeadError(self.peer)
        if message is not None:
            self._connection.give_credit()
        return message
