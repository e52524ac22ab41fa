"""Who talks to whom over what: shared memory inside a fabric, sockets between fabrics.

The control plane runs it once for all processes of an engine:
1. every process calls `open_fabric`, the first one of a box before its neighbours, which get the
   endpoint of the first as an offer;
2. every process opens a `Listener` and publishes its `Endpoint`;
3. every process gets all endpoints and calls `connect`.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Literal

from fomoe.actors.channel import auth
from fomoe.actors.channel.fabric import Fabric, open_memory
from fomoe.actors.channel.spec import FabricHandle, FabricSpec
from fomoe.actors.channel.tcp import Connection
from fomoe.errors import ChannelError

log = logging.getLogger(__name__)

Transport = Literal["auto", "shm", "tcp"]
# A stranger who connects and says nothing holds up the others for at most this long.
GREETING_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a process can be met; `key` is secret and travels over the control plane only.

    `box_id` is the control plane's name of the machine (it may run two "machines" on one host).
    """

    process: str
    box_id: str
    fabric: FabricHandle
    host: str
    port: int
    key: bytes = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that msgpack carries."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Endpoint:
        """The inverse of `to_dict`."""
        return cls(**plain)


class Listener:
    """A listening socket on `host` and a port of the kernel's choice, with a key of its own."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._sock = socket.create_server((host, 0), family=family, backlog=64)
        except OSError as error:
            raise ChannelError(f"cannot listen on {host}: {error}; name an own address") from error
        self._host = host
        self._key = secrets.token_bytes(32)

    def endpoint(self, fabric: Fabric, box_id: str) -> Endpoint:
        """The record that the control plane hands to the other processes."""
        return Endpoint(
            process=fabric.me,
            box_id=box_id,
            fabric=fabric.handle(),
            host=self._host,
            port=self._sock.getsockname()[1],
            key=self._key,
        )

    def accept(
        self, fabric: Fabric, awaited: set[str], deadline: float
    ) -> tuple[str, socket.socket]:
        """The next peer of `awaited` that proves itself; strangers are turned away."""
        while True:
            self._sock.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                sock, address = self._sock.accept()
            except OSError as error:
                raise ChannelError(
                    f"no call from {sorted(awaited)} within the time given"
                ) from error
            try:
                return self._admit(fabric, awaited, sock), sock
            except ChannelError as error:
                sock.close()
                log.warning("turned away %s: %s", address, error)

    def _admit(self, fabric: Fabric, awaited: set[str], sock: socket.socket) -> str:
        def judge(digest: bytes, frm: int, to: int) -> str:
            spec = fabric.spec
            if digest != spec.digest() or frm >= len(spec.processes):
                raise ChannelError("the dialler has another fabric spec")
            peer = spec.processes[frm]
            if peer not in awaited or to != spec.process_index(fabric.me):
                raise ChannelError(f"{peer} was not expected to call")
            return peer

        return auth.accept(sock, self._key, judge, GREETING_S)

    def close(self) -> None:
        """Stops listening."""
        self._sock.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def may_attach(handle: Mapping[str, Any]) -> bool:
    """Whether this process can reach a fabric's memory: same boot, and the memory opens."""
    try:
        os.close(open_memory(handle))
    except ChannelError:
        return False
    return True


def open_fabric(
    spec: FabricSpec,
    me: str,
    box_id: str,
    offers: Iterable[Endpoint] = (),
    transport: Transport = "auto",
) -> Fabric:
    """Attaches to the fabric of an offer or, where none will do, makes one.

    "tcp" takes offers of the same box only, "auto" and "shm" any whose memory can be opened (so
    two boxes on one host become one); "shm" refuses to make a second fabric.
    """
    offered = sorted(offers, key=lambda offer: offer.box_id != box_id)
    for offer in offered:
        if (offer.box_id == box_id or transport != "tcp") and may_attach(offer.fabric):
            return Fabric.attach(offer.fabric, me)
    if offered and transport == "shm":
        raise ChannelError(
            f"{me}: none of the fabrics of {[offer.process for offer in offered]} can be opened "
            "from here; use transport auto or tcp"
        )
    return Fabric.create(spec, me)


def connect(
    fabric: Fabric,
    listener: Listener,
    endpoints: Iterable[Endpoint],
    transport: Transport = "auto",
    timeout_s: float = 10.0,
) -> dict[str, Literal["shm", "tcp"]]:
    """Connects `fabric.me` with every neighbour and says over what; closes the listener.

    A neighbour in the same fabric is met there; one in another fabric is called (the later process
    of the spec calls the earlier one, so calls cannot wait for each other in a circle). All
    processes must run it at the same time. Raises ChannelError after `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    known = {endpoint.process: endpoint for endpoint in endpoints}
    row_of = fabric.spec.process_index
    with listener:
        by_transport = _choose(fabric, known, transport)
        remote = {peer for peer, over in by_transport.items() if over == "tcp"}
        callees = {peer for peer in remote if row_of(peer) < row_of(fabric.me)}
        for peer in sorted(callees, key=row_of):
            _adopt(fabric, peer, _call(fabric, known[peer], deadline))
        callers = remote - callees
        while callers:
            peer, sock = listener.accept(fabric, callers, deadline)
            _adopt(fabric, peer, sock)
            callers.discard(peer)
    return by_transport


def _choose(
    fabric: Fabric, known: Mapping[str, Endpoint], transport: Transport
) -> dict[str, Literal["shm", "tcp"]]:
    by_transport: dict[str, Literal["shm", "tcp"]] = {}
    for peer in fabric.spec.neighbours(fabric.me):
        if peer not in known:
            raise ChannelError(f"{fabric.me}: no endpoint of {peer} was given")
        same = known[peer].fabric["fabric_id"] == fabric.fabric_id
        by_transport[peer] = "shm" if same else "tcp"
    remote = sorted(peer for peer, over in by_transport.items() if over == "tcp")
    if remote and transport == "shm":
        raise ChannelError(f"{fabric.me}: {remote} are in another fabric; use tcp or auto")
    fabric.expect_elsewhere(
        name for name, end in known.items() if end.fabric["fabric_id"] != fabric.fabric_id
    )
    return by_transport


def _adopt(fabric: Fabric, peer: str, sock: socket.socket) -> None:
    connection = Connection(sock, fabric, peer)
    fabric.adopt(peer, connection)
    connection.start()


def _call(fabric: Fabric, endpoint: Endpoint, deadline: float) -> socket.socket:
    spec = fabric.spec
    hello = (spec.digest(), spec.process_index(fabric.me), spec.process_index(endpoint.process))
    left = max(deadline - time.monotonic(), 1e-3)
    try:
        sock = socket.create_connection((endpoint.host, endpoint.port), left)
    except OSError as error:
        raise ChannelError(
            f"{fabric.me} cannot reach {endpoint.process} at {endpoint.host}:{endpoint.port}: "
            f"{error}; check the address and the firewall between the boxes"
        ) from error
    try:
        auth.dial(sock, endpoint.key, hello, max(deadline - time.monotonic(), 1e-3))
    except ChannelError:
        sock.close()
        raise
    return sock
