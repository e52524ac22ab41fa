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
from fomoe.actors.channel.wire import HEADER, REGION, Codec, Frame, Kind, pack_header
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
        self.codec = Codec(fabric.spec)
        spec = fabric.spec
        self.inbox = fabric.inbox(peer) if (peer, fabric.me) in spec.rings else None
        self.room = threading.Condition()
        self.sent = 0  # messages sent; written by the sending thread
        self.acked = 0  # of those, consumed by the peer; written by the reader thread
        self._sock = sock
        self._write_lock = threading.Lock()
        self._rest = memoryview(b"")  # of a pulse that the socket took only half of
        self._told = 0  # consumed count that the peer knows
        self._last_write = self._last_read = time.monotonic()
        self._received = 0
        self._scratch = memoryview(bytearray(max(spec.slot_bytes, 4096)))
        self._closing = False
        self._reader = threading.Thread(target=self._run, name=f"fomoe-tcp-{peer}", daemon=True)
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)

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
        with self._write_lock:
            consumed = self._consumed()
            head = self.codec.pack_message(tag, body.nbytes, regions, self.sent, consumed)
            parts = [body, *(self._region(*region) for region in regions)]
            frame = [memoryview(head), *(part.cast("B") for part in parts if part.nbytes)]
            # Counted before the write: the peer may answer before the write returns.
            self.sent += 1
            self._told = consumed
            self._write(frame)

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
        return memoryview(pack_header(kind, self.sent, self._told))

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
            while True:
                self._deliver()
        except (OSError, ChannelError) as error:
            if not self._closing:
                log.warning("connection to %s ended: %s", self.peer, error)
        finally:
            self.fabric.lose(self.peer)
            with self.room:
                self.room.notify_all()
            self._break()
            with self._write_lock:
                self._sock.close()

    def _deliver(self) -> None:
        header = self._read(HEADER.size)
        frame = self.codec.parse_header(bytes(header))
        if not self.acked <= frame.consumed <= self.sent:
            raise ChannelError(
                f"{self.peer} says it consumed {frame.consumed} messages, {self.sent} were sent"
            )
        if frame.consumed != self.acked:
            with self.room:
                self.acked = frame.consumed
                self.room.notify_all()
        if frame.kind is Kind.MESSAGE:
            self._deliver_message(frame)
        elif frame.kind is Kind.BELL:
            self.fabric.ring_me()

    def _deliver_message(self, frame: Frame) -> None:
        if self.inbox is None or frame.position != self._received:
            raise ChannelError(f"message {frame.position} from {self.peer} was not expected")
        regions = self.codec.parse_regions(self._read(frame.regions * REGION.size))
        payload = self._read(frame.payload_bytes)
        for name, offset, nbytes in regions:
            self._fill(self._region(name, offset, nbytes))
        if self._closing:
            return
        if not self.inbox.try_send(frame.tag, payload):
            raise ChannelError(
                f"{self.peer} sent more than the {self.fabric.spec.ring_slots} slots"
            )
        self._received += 1

    def _read(self, nbytes: int) -> memoryview:
        """The next bytes of the stream; valid until the next call."""
        view = self._scratch[:nbytes]
        self._fill(view)
        return view

    def _fill(self, view: memoryview) -> None:
        while view.nbytes:
            try:
                got = self._sock.recv_into(view)
            except BlockingIOError:
                self._readable.poll(PULSE_S * 1e3)
                got = -1
            now = time.monotonic()
            if got == 0:
                raise ChannelError("it closed the connection")
            if got > 0:
                view = view[got:]
                self._last_read = now
            elif now - self._last_read > SILENCE_S:
                raise ChannelError(f"nothing was heard for {now - self._last_read:.1f} s")
            self._pulse()


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
        if connection.sent - connection.acked >= self._slots:
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
            with self._connection.room:
                if self._connection.sent - self._connection.acked >= self._slots:
                    self._connection.room.wait(min(left, SLICE_S))


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
