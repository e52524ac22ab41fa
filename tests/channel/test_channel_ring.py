"""Rings, bells and flag words inside one process: two fabrics objects on one memory."""

import threading
import time
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe.actors.channel import (
    Fabric,
    FabricSpec,
    load_acquire_u64,
    store_release_u64,
)
from fomoe.actors.channel._channel import Ring
from fomoe.errors import ChannelError, ConfigError, PeerDeadError, PeerStalledError


@pytest.fixture
def joined(pair):
    made = []

    def make(**numbers):
        a = Fabric.create(pair(**numbers), "a")
        b = Fabric.attach(a.handle(), "b")
        made.extend((a, b))
        return a, b

    yield make
    for fabric in made:
        fabric.close()


def test_a_message_arrives_with_its_tag(joined):
    a, b = joined()
    buffer = bytearray(16384)
    assert b.receiver("a").try_recv(buffer) is None
    assert a.sender("b").try_send(2**32 - 1, b"hello")
    assert b.receiver("a").try_recv(buffer) == (2**32 - 1, 5)
    assert buffer[:6] == b"hello\0"
    assert b.receiver("a").try_recv(buffer) is None


@pytest.mark.parametrize(
    "payload",
    [b"abcd", bytearray(b"abcd"), memoryview(b"abcd"), np.frombuffer(b"abcd", np.int16)],
    ids=lambda p: type(p).__name__,
)
def test_any_contiguous_buffer_is_a_payload(joined, payload):
    a, b = joined()
    a.sender("b").try_send(1, payload)
    out = np.zeros(8, np.uint8)
    assert b.receiver("a").try_recv(out) == (1, 4)
    assert bytes(out[:4]) == b"abcd"


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_ring_is_a_bounded_queue(data):
    slots = data.draw(st.integers(1, 5), label="slots")
    slot_bytes = data.draw(st.integers(1, 130), label="slot_bytes")
    spec = FabricSpec(("a", "b"), (("a", "b"),), (), slots, slot_bytes)
    payloads = st.binary(max_size=slot_bytes)
    operations = data.draw(st.lists(st.one_of(st.none(), payloads), max_size=60))
    with Fabric.create(spec, "a") as a, Fabric.attach(a.handle(), "b") as b:
        sender, receiver = a.sender("b"), b.receiver("a")
        expected = deque()
        buffer = bytearray(slot_bytes)
        for tag, payload in enumerate(operations):
            if payload is None:
                got = receiver.try_recv(buffer)
                if not expected:
                    assert got is None
                else:
                    sent_tag, sent = expected.popleft()
                    assert got == (sent_tag, len(sent))
                    assert buffer[: len(sent)] == sent
            else:
                assert sender.try_send(tag, payload) == (len(expected) < slots)
                if len(expected) < slots:
                    expected.append((tag, payload))


def test_a_full_ring_refuses_and_then_stalls(joined):
    a, b = joined(ring_slots=3)
    sender = a.sender("b")
    assert [sender.try_send(i, b"") for i in range(4)] == [True, True, True, False]
    start = time.monotonic()
    with pytest.raises(PeerStalledError, match="b did not answer") as caught:
        sender.send(9, b"", timeout_s=0.25)
    assert 0.25 <= time.monotonic() - start < 1.5
    assert caught.value.waited_s >= 0.25
    buffer = bytearray(1)
    assert [b.receiver("a").try_recv(buffer) for _ in range(4)] == [(0, 0), (1, 0), (2, 0), None]


def test_a_blocked_send_goes_on_when_there_is_room(joined):
    a, b = joined(ring_slots=1)
    a.sender("b").send(0, b"x")
    received = []

    def drain():
        time.sleep(0.15)
        for _ in range(2):
            while (message := b.receiver("a").try_recv(bytearray(1))) is None:
                time.sleep(0.001)
            received.append(message)

    thread = threading.Thread(target=drain)
    thread.start()
    start = time.monotonic()
    a.sender("b").send(1, b"y", timeout_s=5)
    waited = time.monotonic() - start
    thread.join()
    assert received == [(0, 1), (1, 1)]
    assert 0.1 < waited < 2


def test_a_sender_is_woken_not_timed_out(joined):
    a, b = joined(ring_slots=1)

    def drain():
        for _ in range(60):
            while b.receiver("a").try_recv(bytearray(1)) is None:
                time.sleep(0.002)

    thread = threading.Thread(target=drain)
    thread.start()
    start = time.monotonic()
    for i in range(60):
        a.sender("b").send(i, b"x")
    thread.join()
    # Without the wake each of the sleeps would last its slice of 100 ms.
    assert time.monotonic() - start < 3


def test_a_blocked_send_ends_when_its_peer_does(pair):
    delays = []
    for _ in range(3):
        with Fabric.create(pair(ring_slots=1), "a") as a:
            b = Fabric.attach(a.handle(), "b")
            a.sender("b").send(0, b"x")
            closed = []

            def leave(fabric=b, closed=closed):
                closed.append(time.monotonic())
                fabric.close()

            timer = threading.Timer(0.03, leave)
            timer.start()
            with pytest.raises(PeerDeadError):
                a.sender("b").send(1, b"y", timeout_s=30)
            delays.append(time.monotonic() - closed[0])
            timer.join()
    # A sender that is not woken goes on sleeping for the other 70 ms of its slice.
    assert min(delays) < 0.05, delays


def test_sizes_are_bounded(joined):
    a, b = joined(slot_bytes=100)
    with pytest.raises(ChannelError, match="101 bytes does not fit a slot of 100"):
        a.sender("b").try_send(0, bytes(101))
    a.sender("b").try_send(5, bytes(100))
    with pytest.raises(ChannelError, match="does not fit a buffer of 99"):
        b.receiver("a").try_recv(bytearray(99))
    assert b.receiver("a").try_recv(bytearray(100)) == (5, 100)  # it was not lost


def test_a_strided_or_readonly_buffer_is_refused(joined):
    a, b = joined()
    with pytest.raises((BufferError, ValueError)):
        a.sender("b").try_send(0, np.zeros(8, np.uint8)[::2])
    a.sender("b").try_send(0, b"x")
    with pytest.raises((BufferError, TypeError, ValueError)):
        b.receiver("a").try_recv(b"read-only")


@pytest.mark.parametrize("field", [0, 15], ids=["position", "nbytes"])
def test_a_damaged_ring_is_noticed(joined, field):
    a, b = joined(ring_slots=2, slot_bytes=64)
    a.sender("b").try_send(0, b"x")
    memory = np.frombuffer(a._memory, np.uint8)
    first_slot = 4096 * 2 + 5 * 64
    assert memory[first_slot + 12] == 1  # nbytes
    memory[first_slot + field] = 255
    with pytest.raises(ChannelError, match="damaged at message 0"):
        b.receiver("a").try_recv(bytearray(64))


def test_wait_returns_false_after_the_timeout(joined):
    a, _ = joined()
    for spin_us in (0, 200):
        start = time.monotonic()
        assert not a.wait(a.bell(), spin_us, 30)
        assert 0.03 <= time.monotonic() - start < 1
    assert not a.wait(a.bell(), 0, 0)


def test_a_sleep_costs_no_processor_time(joined):
    a, _ = joined()
    before = time.thread_time()
    assert not a.wait(a.bell(), 0, 300)
    assert time.thread_time() - before < 0.1


def test_a_long_wait_spins_once_and_sleeps_in_slices(joined, monkeypatch):
    a, _ = joined()
    calls = []

    class Plane:
        def wait(self, row, seen, spin_us, timeout_ms):
            calls.append((spin_us, timeout_ms))
            time.sleep(0.05)
            return False

    with monkeypatch.context() as patch:
        patch.setattr(a, "_plane", Plane())
        assert not a.wait(0, 700, 220)
    assert [spin for spin, _ in calls[:3]] == [700, 0, 0]
    assert calls[0] == (700, 100)
    assert all(0 < timeout <= 100 for _, timeout in calls)


def test_nobody_waits_for_room_that_a_dead_peer_would_make(joined):
    a, b = joined(ring_slots=1)
    a.sender("b").send(0, b"x")
    ring = Ring(a._plane, 0)
    assert not ring.wait_space(0, 30)
    b.close()
    start = time.monotonic()
    assert ring.wait_space(0, 10_000)
    assert time.monotonic() - start < 0.09


def test_a_bell_that_rang_before_the_wait_is_heard(joined):
    a, b = joined()
    bell = a.bell()
    b.ring("a")
    start = time.monotonic()
    assert a.wait(bell, 0, 5000)
    assert time.monotonic() - start < 1
    assert not a.wait(a.bell(), 0, 1)


def test_a_sleeper_is_woken_by_bell_and_message(joined):
    a, b = joined()
    for wake in (lambda: b.ring("a"), lambda: b.sender("a").try_send(0, b"")):
        timer = threading.Timer(0.05, wake)
        bell = a.bell()
        start = time.monotonic()
        timer.start()
        assert a.wait(bell, 0, 10_000)
        assert time.monotonic() - start < 2
        timer.join()


def test_several_threads_may_sleep_on_one_bell(joined):
    a, b = joined()
    bell, heard = a.bell(), []
    threads = [
        threading.Thread(target=lambda: heard.append(a.wait(bell, 0, 10_000))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    b.ring("a")
    for thread in threads:
        thread.join(3)
    assert heard == [True] * 4


def test_arenas_are_shared_aligned_and_bounded(joined):
    a, b = joined()
    for name, nbytes in a.spec.arenas:
        ours, theirs = a.arena(name), b.arena(name)
        assert ours.shape == theirs.shape == (nbytes,)
        assert ours.ctypes.data % 4096 == 0
        ours[-1] = 7
        assert theirs[-1] == 7
    assert not b.arena("routes").tobytes().strip(b"\0\7")


def test_an_arena_outlives_its_fabric(pair):
    fabric = Fabric.create(pair(), "a")
    arena = fabric.arena("states")
    fabric.close()
    fabric.close()
    arena[:] = 3
    assert int(arena.sum()) == 30_000


def test_flag_words():
    words = np.zeros(6, np.uint64)
    store_release_u64(words, 2, 2**64 - 1)
    store_release_u64(words, 4, 5)
    assert load_acquire_u64(words, 2) == 2**64 - 1


@pytest.mark.parametrize("index", [-1, 6])
def test_flag_words_are_bounded(index):
    words = np.zeros(6, np.uint64)
    with pytest.raises(IndexError):
        store_release_u64(words, index, 1)
    with pytest.raises(IndexError):
        load_acquire_u64(words, index)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((("a", "a"), ()), "named twice"),
        ((("a", ""), ()), "1 to 64"),
        ((("a",), (("a", "a"),)), "no two known"),
        ((("a",), (("a", "z"),)), "no two known"),
        ((("a", "b"), (("a", "b"), ("a", "b"))), "named twice"),
        ((("a",), (), (("x", 0),)), "out of range"),
        ((("a",), (), (), 0), "ring_slots 0"),
        ((("a",), (), (), 1, 1 << 25), "slot_bytes"),
    ],
)
def test_specs_that_cannot_be_are_refused(arguments, match):
    with pytest.raises(ConfigError, match=match):
        FabricSpec(*arguments)


def test_a_spec_survives_the_wire(pair):
    msgpack = pytest.importorskip("msgpack")
    spec = pair(ring_slots=5)
    again = FabricSpec.from_dict(msgpack.unpackb(msgpack.packb(spec.to_dict())))
    assert again == spec
    assert again.digest() == spec.digest() != pair(ring_slots=6).digest()


def test_unknown_names_are_refused(joined):
    a, _ = joined()
    with pytest.raises(ConfigError, match="no ring 'a' -> 'z'"):
        a.sender("z")
    with pytest.raises(ConfigError, match="no process 'z'"):
        Fabric.attach(a.handle(), "z")
