"""The two ends of a ring, the same for a peer on this box and for one behind a socket."""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy.typing as npt

from fomoe.actors.channel._channel import Ring
from fomoe.errors import PeerDeadError, PeerStalledError

Buffer = bytes | bytearray | memoryview | npt.NDArray[Any]
WritableBuffer = bytearray | memoryview | npt.NDArray[Any]
Regions = tuple[tuple[str, int, int], ...]

SLICE_S = 0.1  # a blocking call comes back to Python this often, so that signal handlers run
SPIN_US = 20.0  # a full ring drains in microseconds when its consumer is running


class Sender(Protocol):
    """Sends to one peer, in order; used by one thread at a time."""

    @property
    def peer(self) -> str:
        """The process that the messages go to."""
        ...

    def try_send(self, tag: int, payload: Buffer, regions: Regions = ()) -> bool:
        """Sends one message, or returns False when the peer has `ring_slots` unread ones.

        `tag` is 0 to 2**32 - 1, `payload` any contiguous buffer of up to `slot_bytes` bytes.
        `regions` are (arena, offset, nbytes) ranges that the receiver reads because of this
        message: it sees their content of now, on whatever box it runs. Raises PeerDeadError.
        """
        ...

    def send(self, tag: int, payload: Buffer, regions: Regions = (), timeout_s: float = 5) -> None:
        """Like `try_send`, but waits for room; PeerStalledError after `timeout_s` seconds."""
        ...


class Receiver(Protocol):
    """Receives from one peer, in order; used by one thread at a time."""

    @property
    def peer(self) -> str:
        """The process that the messages come from."""
        ...

    def try_recv(self, buffer: WritableBuffer) -> tuple[int, int] | None:
        """Copies the oldest message into `buffer`; (tag, bytes), or None when there is none.

        A peer that died is heard out first: PeerDeadError comes when its ring is empty.
        """
        ...


class RingSender:
    """Sender into a ring of shared memory."""

    def __init__(self, ring: Ring, peer: str) -> None:
        self.peer = peer
        self._ring = ring

    def try_send(self, tag: int, payload: Buffer, regions: Regions = ()) -> bool:
        """See `Sender`; `regions` need no work, both ends map the same arenas."""
        if self._ring.consumer_gone():
            raise PeerDeadError(self.peer)
        return self._ring.try_send(tag, payload)

    def send(self, tag: int, payload: Buffer, regions: Regions = (), timeout_s: float = 5) -> None:
        """See `Sender`."""
        if not self._ring.consumer_gone() and self._ring.try_send(tag, payload):
            return  # nearly always, and a layer waits for it
        started = time.monotonic()
        while True:
            left = started + timeout_s - time.monotonic()
            self._ring.wait_space(SPIN_US, max(0.0, min(left, SLICE_S)) * 1e3)
            if self.try_send(tag, payload, regions):
                return
            if left <= 0:
                raise PeerStalledError(self.peer, time.monotonic() - started)


class RingReceiver:
    """Receiver out of a ring of shared memory."""

    def __init__(self, ring: Ring, peer: str) -> None:
        self.peer = peer
        self._ring = ring

    def try_recv(self, buffer: WritableBuffer) -> tuple[int, int] | None:
        """See `Receiver`."""
        message = self._ring.try_recv(buffer)
        if message is None and self._ring.producer_gone():
            # Looked at again: the last message may have come between the two looks above.
            message = self._ring.try_recv(buffer)
            if message is None:
                raise PeerDeadError(self.peer)
        return message
