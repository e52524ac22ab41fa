"""Control messages over a ring: long ones go in parts, short ones in one piece."""

from __future__ import annotations

import numpy as np

from fomoe.actors.channel import Fabric
from fomoe.actors.messages import Message, Tag, decode, encode


class MessagePort:
    """Both directions of control messages with one peer; used by one thread at a time."""

    def __init__(self, fabric: Fabric, peer: str, bound_s: float = 5.0) -> None:
        self._sender = fabric.sender(peer)
        self._receiver = fabric.receiver(peer)
        self._most = fabric.spec.slot_bytes
        self._buffer = np.zeros(self._most, np.uint8)
        self._parts = bytearray()
        self._bound_s = bound_s

    def send(self, message: Message) -> None:
        """Send a message of any length; PeerStalledError when the peer takes none in time."""
        data = encode(message)
        for start in range(0, len(data), self._most):
            tag, part = self._part(data, start)
            self._sender.send(tag, part, (), self._bound_s)

    def try_send(self, data: bytes, start: int) -> int:
        """Send an encoded message from byte `start` on as far as there is room; never waits.

        Returns up to where it got. A message must be sent to its end before the next one.
        """
        while start < len(data):
            tag, part = self._part(data, start)
            if not self._sender.try_send(tag, part):
                break
            start += len(part)
        return start

    def _part(self, data: bytes, start: int) -> tuple[Tag, bytes]:
        end = start + self._most
        return Tag.MESSAGE if end >= len(data) else Tag.MESSAGE_PART, data[start:end]

    def receive(self) -> Message | None:
        """Return the next whole message, None where there is none; PeerDeadError at the end."""
        while (arrived := self._receiver.try_recv(self._buffer)) is not None:
            tag, nbytes = arrived
            self._parts += self._buffer[:nbytes].tobytes()
            if tag == Tag.MESSAGE:
                data = bytes(self._parts)
                self._parts.clear()
                return decode(data)
        return None
