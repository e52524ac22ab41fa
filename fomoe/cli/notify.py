"""Tells systemd how far the server is (`Type=notify`)."""

from __future__ import annotations

import socket


def notify(address: str | None, message: str) -> None:
    r"""Send a message such as `READY=1` or `STATUS=loading` to the service manager.

    Args:
        address: A path, or `@name` in the abstract namespace; None where nobody listens.
        message: Assignments, separated by newlines.

    Source: sd_notify(3): one datagram to the socket that $NOTIFY_SOCKET names.
    """
    if address is None:
        return
    target = f"\0{address[1:]}" if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(message.encode(), target)
