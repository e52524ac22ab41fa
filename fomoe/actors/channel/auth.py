"""Mutual proof that both ends of a new socket know the listener's key; nothing else is parsed.

    accept -> dial     nonce A (32 bytes)
    dial   -> accept   nonce D (32), HMAC(key, "dial", A, D, hello) (32), hello (40)
    accept -> dial     HMAC(key, "accept", A, D, hello) (32)

HMAC-SHA256; all parts have fixed sizes. The hello (spec digest, from, to) is looked at only after
its HMAC was found right. Frames that follow are not encrypted: the key keeps strangers from
talking to an engine, a hostile network between the boxes needs a tunnel.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time
from collections.abc import Callable

from fomoe.errors import ChannelError

NONCE = MAC = 32
HELLO = struct.Struct("<32sII")


def accept(
    sock: socket.socket, key: bytes, admit: Callable[[bytes, int, int], str], timeout_s: float
) -> str:
    """Proves a dialler, lets `admit` judge its hello (spec digest, from, to), and answers.

    Returns what `admit` returned: the peer's name. Raises ChannelError when the key is wrong, the
    dialler is silent or `admit` refuses.
    """
    deadline = time.monotonic() + timeout_s
    nonce = secrets.token_bytes(NONCE)
    try:
        sock.settimeout(timeout_s)
        sock.sendall(nonce)
        answer = _receive(sock, NONCE + MAC + HELLO.size, deadline)
        dialled, mac, hello = answer[:NONCE], answer[NONCE : NONCE + MAC], answer[NONCE + MAC :]
        if not hmac.compare_digest(mac, _mac(key, b"dial", nonce, dialled, hello)):
            raise ChannelError("the dialler does not know the key")
        peer = admit(*HELLO.unpack(hello))
        sock.sendall(_mac(key, b"accept", nonce, dialled, hello))
    except OSError as error:
        raise ChannelError(f"the dialler did not finish the handshake: {error}") from error
    return peer


def dial(sock: socket.socket, key: bytes, hello: tuple[bytes, int, int], timeout_s: float) -> None:
    """Proves this end to a listener and the listener to this end; ChannelError otherwise."""
    deadline = time.monotonic() + timeout_s
    packed = HELLO.pack(*hello)
    nonce = secrets.token_bytes(NONCE)
    try:
        sock.settimeout(timeout_s)
        accepted = _receive(sock, NONCE, deadline)
        sock.sendall(nonce + _mac(key, b"dial", accepted, nonce, packed) + packed)
        answer = _receive(sock, MAC, deadline)
    except OSError as error:
        raise ChannelError(f"the listener refused the key or did not answer: {error}") from error
    if not hmac.compare_digest(answer, _mac(key, b"accept", accepted, nonce, packed)):
        raise ChannelError("the listener does not know the key")


def _mac(key: bytes, role: bytes, accepted: bytes, dialled: bytes, hello: bytes) -> bytes:
    return hmac.digest(key, b"fomoe " + role + accepted + dialled + hello, "sha256")


def _receive(sock: socket.socket, nbytes: int, deadline: float) -> bytes:
    got = bytearray()
    while len(got) < nbytes:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(left)
        piece = sock.recv(nbytes - len(got))
        if not piece:
            raise ConnectionError("the other end closed the connection")
        got += piece
    return bytes(got)
