"""Who shares memory, who gets a socket, and who is turned away."""

import socket
import threading
import time

import pytest

from fomoe.actors.channel import (
    Endpoint,
    Fabric,
    FabricSpec,
    Listener,
    auth,
    connect,
    handshake,
    may_attach,
    open_fabric,
)
from fomoe.errors import ChannelError

RINGS = (("driver", "store"), ("store", "driver"), ("driver", "gpu"), ("gpu", "driver"))
SPEC = FabricSpec(("driver", "store", "gpu"), (*RINGS, ("store", "gpu"), ("gpu", "store")))


def test_two_boxes_on_one_host_meet_over_tcp_and_inside_over_memory(link):
    fabrics, over = link(SPEC, {"A": ["driver"], "B": ["store", "gpu"]}, "tcp")
    assert over == {
        "driver": {"store": "tcp", "gpu": "tcp"},
        "store": {"driver": "tcp", "gpu": "shm"},
        "gpu": {"driver": "tcp", "store": "shm"},
    }
    assert fabrics["store"].fabric_id == fabrics["gpu"].fabric_id != fabrics["driver"].fabric_id
    buffer = bytearray(16384)
    for frm, to in SPEC.rings:
        fabrics[frm].sender(to).send(5, f"{frm} to {to}".encode())
    for frm, to in SPEC.rings:
        message, deadline = None, time.monotonic() + 5
        while message is None and time.monotonic() < deadline:
            message = fabrics[to].receiver(frm).try_recv(buffer)
        assert message == (5, len(f"{frm} to {to}"))
        assert buffer[: message[1]] == f"{frm} to {to}".encode()
    assert all(fabrics["driver"].attached(name) for name in ("store", "gpu"))
    assert fabrics["store"].sender("gpu") is fabrics["store"].sender("gpu")


def offer(fabric, box):
    with Listener() as listener:
        return listener.endpoint(fabric, box)


def test_fabrics_are_shared_as_the_transport_says():
    with Fabric.create(SPEC, "driver") as first:
        offers = [offer(first, "A")]
        with open_fabric(SPEC, "gpu", "B", offers, "tcp") as other:
            assert other.fabric_id != first.fabric_id
        with open_fabric(SPEC, "gpu", "A", offers, "tcp") as same:
            assert same.fabric_id == first.fabric_id
        with open_fabric(SPEC, "store", "B", offers, "auto") as merged:
            assert merged.fabric_id == first.fabric_id


def test_a_fabric_out_of_reach_is_not_shared():
    with Fabric.create(SPEC, "driver") as first:
        end = offer(first, "A")
        far = Endpoint.from_dict(end.to_dict() | {"fabric": first.handle() | {"boot_id": "x"}})
        assert may_attach(end.fabric)
        assert not may_attach(far.fabric)
        with open_fabric(SPEC, "gpu", "B", [far], "auto") as own:
            assert own.fabric_id != first.fabric_id
        with pytest.raises(ChannelError, match=r"none of the fabrics of \['driver'\]"):
            open_fabric(SPEC, "gpu", "B", [far], "shm")


def test_an_endpoint_survives_the_wire_and_hides_its_key():
    msgpack = pytest.importorskip("msgpack")
    with Fabric.create(SPEC, "driver") as fabric:
        end = offer(fabric, "A")
        again = Endpoint.from_dict(msgpack.unpackb(msgpack.packb(end.to_dict())))
        assert (again.process, again.box_id, again.port, again.key) == (
            "driver",
            "A",
            end.port,
            end.key,
        )
        assert may_attach(again.fabric)
        assert len(end.key) == 32
        assert "key" not in repr(end)


def test_missing_and_unreachable_peers_are_named():
    with Fabric.create(SPEC, "driver") as a, Fabric.create(SPEC, "store") as b:
        with pytest.raises(ChannelError, match="no endpoint of store"):
            connect(a, Listener(), [])
        ends = [offer(a, "A"), offer(b, "B"), offer(b, "B")]
        ends[2] = Endpoint.from_dict(ends[1].to_dict() | {"process": "gpu"})
        with pytest.raises(ChannelError, match=r"\['gpu', 'store'\] are in another fabric"):
            connect(a, Listener(), ends, "shm")
        with pytest.raises(ChannelError, match=r"no call from \['gpu', 'store'\] within"):
            connect(a, Listener(), ends, "tcp", 0.1)
        with pytest.raises(ChannelError, match=r"cannot reach driver at 127\.0\.0\.1"):
            connect(b, Listener(), ends, "tcp", 2)


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(ChannelError, match=r"cannot listen on 203\.0\.113\.1"):
        Listener("203.0.113.1")


@pytest.fixture
def awaiting(monkeypatch):
    """A listener that waits for "b", and what becomes of it."""
    monkeypatch.setattr(handshake, "GREETING_S", 0.3)
    spec = FabricSpec(("a", "b"), (("a", "b"), ("b", "a")))
    fabric, listener, outcome = Fabric.create(spec, "a"), Listener(), {}
    end = listener.endpoint(fabric, "A")

    def wait():
        try:
            outcome["peer"], sock = listener.accept(fabric, {"b"}, time.monotonic() + 1)
            sock.close()
        except ChannelError as error:
            outcome["error"] = error

    thread = threading.Thread(target=wait)
    thread.start()
    yield spec, end, thread, outcome
    thread.join(5)
    listener.close()
    fabric.close()


def call(end, key, hello):
    with socket.create_connection((end.host, end.port), 5) as sock:
        auth.dial(sock, key, hello, 3)


def test_strangers_are_turned_away_and_the_peer_gets_in(awaiting):
    spec, end, thread, outcome = awaiting
    wrong_key = bytes(32)
    for key, hello in [
        (wrong_key, (spec.digest(), 1, 0)),
        (end.key, (bytes(32), 1, 0)),
        (end.key, (spec.digest(), 0, 0)),
        (end.key, (spec.digest(), 1, 1)),
        (end.key, (spec.digest(), 2**31, 0)),
    ]:
        with pytest.raises(ChannelError, match="refused the key or did not answer"):
            call(end, key, hello)
    with socket.create_connection((end.host, end.port), 5) as rude:
        rude.sendall(b"GET / HTTP/1.1\r\n\r\n".ljust(104))
        while rude.recv(100):  # the nonce, then the end
            pass
    assert not outcome
    call(end, end.key, (spec.digest(), 1, 0))
    thread.join(5)
    assert outcome == {"peer": "b"}


def test_a_silent_stranger_only_delays(awaiting):
    spec, end, thread, outcome = awaiting
    with socket.create_connection((end.host, end.port), 5):
        call(end, end.key, (spec.digest(), 1, 0))
    thread.join(5)
    assert outcome == {"peer": "b"}


def test_nobody_called(awaiting):
    _, _, thread, outcome = awaiting
    thread.join(5)
    assert "no call from ['b']" in str(outcome["error"])


def test_a_listener_without_the_key_is_found_out():
    here, there = socket.socketpair()
    key, hello = bytes(32), (bytes(32), 0, 1)

    def impostor():
        there.sendall(bytes(32))
        answer = there.recv(104, socket.MSG_WAITALL)
        there.sendall(answer[32:64])  # reflects the dialler's own proof

    thread = threading.Thread(target=impostor)
    thread.start()
    with here, there, pytest.raises(ChannelError, match="the listener does not know the key"):
        auth.dial(here, key, hello, 3)
    thread.join()
