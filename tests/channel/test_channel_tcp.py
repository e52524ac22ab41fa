"""The TCP twin: the same messages, and hostile or broken peers."""

import contextlib
import os
import signal
import socket
import threading
import time

import numpy as np
import pytest
from channel_peer import receive

from fomoe.actors.channel import Endpoint, Fabric, FabricSpec, Listener, auth, connect, tcp
from fomoe.actors.channel.wire import HEADER, MAGIC, REGION, Kind
from fomoe.errors import ChannelError, PeerDeadError, PeerStalledError

BOXES = {"box 1": ["a"], "box 2": ["b"]}


@pytest.fixture
def linked(link, pair):
    def make(**numbers):
        fabrics, over = link(pair(**numbers), BOXES)
        assert over == {"a": {"b": "tcp"}, "b": {"a": "tcp"}}
        return fabrics["a"], fabrics["b"]

    return make


def until(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert condition()


def play(a, b, script):
    """Sends and receives by script; what was received, in order."""
    got, buffer = [], bytearray(a.spec.slot_bytes)
    for tag, payload in script:
        a.sender("b").send(tag, payload)
        if tag % 3:
            got_tag, nbytes = receive(b, b.receiver("a"), buffer)
            got.append((got_tag, bytes(buffer[:nbytes])))
    while len(got) < len(script):
        got_tag, nbytes = receive(b, b.receiver("a"), buffer)
        got.append((got_tag, bytes(buffer[:nbytes])))
    return got


def test_tcp_and_shared_memory_deliver_the_same_sequence(linked, link, pair):
    rng = np.random.default_rng(5)
    script = [(i, rng.bytes(int(rng.integers(0, 600)))) for i in range(300)]
    numbers = {"ring_slots": 200, "slot_bytes": 600}
    near, over = link(pair(**numbers), {"box": ["a", "b"]})
    assert over == {"a": {"b": "shm"}, "b": {"a": "shm"}}
    assert play(near["a"], near["b"], script) == play(*linked(**numbers), script) == script


def test_regions_are_there_before_their_message(linked):
    a, b = linked()
    rng = np.random.default_rng(1)
    buffer = bytearray(16)
    for _ in range(50):
        a.arena("states")[:] = rng.integers(0, 256, 10_000, np.uint8)
        a.arena("routes")[:8] = rng.integers(0, 256, 8, np.uint8)
        a.sender("b").send(1, b"", (("states", 100, 9000), ("routes", 0, 8), ("routes", 9, 0)))
        assert receive(b, b.receiver("a"), buffer) == (1, 0)
        assert (b.arena("states")[100:9100] == a.arena("states")[100:9100]).all()
        assert (b.arena("routes")[:8] == a.arena("routes")[:8]).all()
        assert not b.arena("states")[:100].any()
        assert not b.arena("states")[9100:].any()


def test_a_region_bigger_than_all_socket_buffers(link):
    spec = FabricSpec(("a", "b"), (("a", "b"), ("b", "a")), (("big", 48 << 20),))
    fabrics, _ = link(spec, BOXES)
    a, b = fabrics["a"], fabrics["b"]
    a.arena("big")[::4096] = np.arange(12288) % 251
    a.sender("b").send(1, b"!", (("big", 0, 48 << 20),))
    assert receive(b, b.receiver("a"), bytearray(1 << 14)) == (1, 1)
    assert (b.arena("big")[::4096] == np.arange(12288) % 251).all()


def test_backpressure_is_that_of_a_ring(linked):
    a, b = linked(ring_slots=4)
    sender, receiver = a.sender("b"), b.receiver("a")
    assert [sender.try_send(i, b"x") for i in range(5)] == [True] * 4 + [False]
    with pytest.raises(PeerStalledError):
        sender.send(9, b"", timeout_s=0.2)
    buffer = bytearray(16)
    assert [receive(b, receiver, buffer)[0] for _ in range(4)] == [0, 1, 2, 3]
    sender.send(5, b"", timeout_s=5)
    assert receive(b, receiver, buffer) == (5, 0)


def test_a_sender_waits_for_a_slow_receiver(linked):
    a, b = linked(ring_slots=3, slot_bytes=64)
    got = []

    def drain():
        buffer = bytearray(64)
        for i in range(500):
            if i % 100 == 0:
                time.sleep(0.02)
            got.append(receive(b, b.receiver("a"), buffer)[0])

    thread = threading.Thread(target=drain)
    thread.start()
    for i in range(500):
        a.sender("b").send(i, bytes(i % 65), timeout_s=10)
    thread.join(10)
    assert got == list(range(500))


def test_a_sender_is_woken_by_credit_not_timed_out(linked):
    a, b = linked(ring_slots=1)

    def drain():
        for _ in range(40):
            receive(b, b.receiver("a"), bytearray(16384))
            time.sleep(0.003)

    thread = threading.Thread(target=drain)
    thread.start()
    start = time.monotonic()
    for i in range(40):
        a.sender("b").send(i, b"x")
    thread.join()
    # Without the wake each of the sleeps would last its slice of 100 ms.
    assert time.monotonic() - start < 2.5


def test_a_ring_of_one_direction(link):
    spec = FabricSpec(("a", "b"), (("a", "b"),), (), 2)
    fabrics, _ = link(spec, BOXES)
    for i in range(20):  # credit comes back without a ring that goes back
        fabrics["a"].sender("b").send(i, b"", timeout_s=5)
        assert receive(fabrics["b"], fabrics["b"].receiver("a"), bytearray(8)) == (i, 0)


def test_bells_ring_across(linked):
    a, b = linked()
    bell = b.bell()
    a.ring("b")
    assert b.wait(bell, 0, 5000)


def test_what_does_not_fit_is_refused_and_harms_nothing(linked):
    a, b = linked(slot_bytes=100)
    send = a.sender("b").try_send
    for call, match in [
        (lambda: send(0, bytes(101)), "does not fit a slot of 100"),
        (lambda: send(-1, b""), "tag -1"),
        (lambda: send(0, b"", (("nowhere", 0, 1),)), "no arena 'nowhere'"),
        (lambda: send(0, b"", (("routes", 4000, 97),)), "outside of arena 'routes'"),
        (lambda: send(0, b"", (("routes", 0, 1),) * 65), "65 regions"),
    ]:
        with pytest.raises(ChannelError, match=match):
            call()
    with pytest.raises((TypeError, BufferError)):
        send(0, np.zeros(10, np.uint8)[::2])
    assert send(1, bytes(100))
    assert receive(b, b.receiver("a"), bytearray(100)) == (1, 100)


def test_a_closed_end_is_heard_out_and_then_dead(linked):
    a, b = linked()
    for i in range(10):
        a.sender("b").send(i, b"last")
    a.close()
    buffer = bytearray(16384)
    assert [receive(b, b.receiver("a"), buffer)[0] for _ in range(10)] == list(range(10))
    with pytest.raises(PeerDeadError, match="a has died"):
        receive(b, b.receiver("a"), buffer)
    with pytest.raises(PeerDeadError):
        b.sender("a").send(0, b"")


def test_a_quiet_connection_lives_and_a_frozen_peer_does_not(monkeypatch, spawn, pair):
    monkeypatch.setattr(tcp, "SILENCE_S", 0.7)
    with Fabric.create(pair(), "a") as a:
        peer = meet(a, spawn)
        time.sleep(1.2)
        assert not a.peer_dead("b")
        os.kill(peer.pid, signal.SIGSTOP)
        with pytest.raises(PeerDeadError):
            receive(a, a.receiver("b"), bytearray(16384))


def meet(fabric, spawn):
    """A process on another box, connected."""
    peer = spawn("remote_echo", spec=fabric.spec.to_dict(), me="b", box_id="box 2", transport="tcp")
    listener = Listener()
    mine = listener.endpoint(fabric, "box 1")
    theirs = peer.hear()["endpoint"]
    theirs["key"] = bytes.fromhex(theirs["key"])
    peer.tell([mine.to_dict() | {"key": mine.key.hex()}])
    assert connect(fabric, listener, [mine, Endpoint.from_dict(theirs)]) == {"b": "tcp"}
    assert peer.hear() == {"over": {"a": "tcp"}}
    return peer


def test_echo_with_another_process_until_it_is_killed(spawn, pair):
    with Fabric.create(pair(), "a") as a:
        peer = meet(a, spawn)
        assert a.attached("b")
        buffer = bytearray(16384)
        sender, receiver = a.sender("b"), a.receiver("b")
        for tag in range(300):
            payload = bytes([tag % 256]) * (tag * 57 % 16385)
            sender.send(tag % 99, payload)
            assert receive(a, receiver, buffer) == (tag % 99, len(payload))
            assert buffer[: len(payload)] == payload
        a.arena("states")[100:200] = np.arange(100)
        sender.send(99, b"", (("states", 100, 100),))
        receive(a, receiver, buffer)
        assert a.arena("states")[5000:5100].tolist() == list(range(1, 101))
        start = time.monotonic()
        peer.kill()
        with pytest.raises(PeerDeadError):
            receive(a, receiver, buffer)
        assert time.monotonic() - start < 0.5


class Impostor:
    """Knows the key and speaks frames by hand."""

    def __init__(self, victim, listener):
        end = listener.endpoint(victim, "box 1")
        self.sock = socket.create_connection((end.host, end.port), 5)
        spec = victim.spec
        hello = (spec.digest(), spec.process_index("b"), spec.process_index("a"))
        auth.dial(self.sock, end.key, hello, 5)

    def say(self, *parts):
        self.sock.sendall(b"".join(parts))


def header(kind=Kind.MESSAGE, regions=0, tag=0, nbytes=0, position=0, consumed=0, magic=MAGIC):
    return HEADER.pack(magic, kind, regions, tag, nbytes, position, consumed)


@pytest.fixture
def victim(pair):
    """A fabric whose peer is an impostor."""
    spec = pair(ring_slots=2, slot_bytes=100)
    with Fabric.create(spec, "a") as a:
        with Fabric.create(spec, "b") as b, Listener() as other:
            theirs = other.endpoint(b, "box 2")
        listener = Listener()
        thread = threading.Thread(target=connect, args=(a, listener, [theirs], "tcp", 5))
        thread.start()
        impostor = Impostor(a, listener)
        thread.join(5)
        yield a, impostor
        impostor.sock.close()


def test_an_honest_frame_by_hand_is_delivered(victim):
    a, impostor = victim
    impostor.say(header(tag=3, nbytes=2, regions=1), REGION.pack(1, 4, 3), b"hi", b"xyz")
    buffer = bytearray(100)
    assert receive(a, a.receiver("b"), buffer) == (3, 2)
    assert buffer[:2] == b"hi"
    assert a.arena("routes")[3:8].tobytes() == b"\0xyz\0"


@pytest.mark.parametrize(
    "frames",
    [
        [b"GET / HTTP/1.1\r\n".ljust(64)],
        [header(magic=MAGIC + 1)],
        [header(kind=7)],
        [header(nbytes=101)],
        [header(nbytes=2**32 - 1)],
        [header(regions=65)],
        [header(kind=Kind.PULSE, nbytes=1)],
        [header(position=1)],
        [header(consumed=1)],
        [header(regions=1), REGION.pack(2, 0, 1)],
        [header(regions=1), REGION.pack(1, 4096, 1)],
        [header(regions=1), REGION.pack(1, 2**64 - 1, 2)],
        [header(regions=1), REGION.pack(0, 0, 10_001)],
    ],
)
def test_a_bad_frame_ends_the_connection_and_changes_nothing(victim, frames):
    a, impostor = victim
    impostor.say(*frames)
    with pytest.raises(PeerDeadError):
        receive(a, a.receiver("b"), bytearray(100))
    assert not any(a.arena(name).any() for name, _ in a.spec.arenas)
    impostor.sock.settimeout(5)
    with contextlib.suppress(ConnectionResetError):
        while impostor.sock.recv(64):  # what was under way, then the end
            pass


@pytest.mark.parametrize("cut", [1, 63, 64, 70, 89, 100])
def test_a_truncated_frame_is_not_delivered(victim, cut):
    a, impostor = victim
    whole = header(nbytes=10, regions=1) + REGION.pack(1, 0, 3) + bytes(10) + b"xyz"
    impostor.say(whole[:cut])
    impostor.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(PeerDeadError):
        receive(a, a.receiver("b"), bytearray(100))


def test_more_messages_than_slots_end_the_connection(victim):
    a, impostor = victim
    impostor.say(*(header(tag=i, position=i) for i in range(3)))
    until(lambda: a.peer_dead("b"))
    buffer = bytearray(100)
    assert [receive(a, a.receiver("b"), buffer)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(PeerDeadError):
        receive(a, a.receiver("b"), buffer)
