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
        last = max(0, len(data) - 1) // self._most * self._most
        for start in range(0, last, self._most):
            part = data[start : start + self._most]
            self._sender.send(Tag.MESSAGE_PART, part, (), self._bound_s)
        self._sender.send(Tag.MESSAGE, data[last:], (), self._bound_s)

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
