"""Control messages over real rings: in one piece, in parts, both ways, and when they cannot go."""

import threading

import numpy as np
import pytest

from fomoe.actors.channel import Fabric, FabricSpec
from fomoe.actors.messages import Cancel, LogitsRequest, LogitsRows, StatusRequest, Tag, encode
from fomoe.actors.wire import MessagePort
from fomoe.errors import PeerDeadError, PeerStalledError

SLOT_BYTES, RING_SLOTS = 256, 8


@pytest.fixture
def ends():
    """The ports of two processes, `a` and `b`, over small rings."""
    spec = FabricSpec(
        ("a", "b"), (("a", "b"), ("b", "a")), (), ring_slots=RING_SLOTS, slot_bytes=SLOT_BYTES
    )
    with Fabric.create(spec, "a") as first, Fabric.attach(first.handle(), "b") as second:
        yield first, second


def ports(ends, bound_s=5.0):
    return MessagePort(ends[0], "b", bound_s), MessagePort(ends[1], "a", bound_s)


def rows_message(nbytes):
    """A message whose wire form has exactly `nbytes` bytes."""
    empty = len(encode(LogitsRows(request_id="r", start=0, data=b"")))
    for extra in range(8):  # msgpack's length prefix of the data grows by up to 3 bytes
        message = LogitsRows(request_id="r", start=0, data=b"x" * (nbytes - empty - extra))
        if len(encode(message)) == nbytes:
            return message
    raise AssertionError(nbytes)


@pytest.mark.parametrize("nbytes", [
    SLOT_BYTES - 1, SLOT_BYTES, SLOT_BYTES + 1, 2 * SLOT_BYTES, 2 * SLOT_BYTES + 1, 7 * SLOT_BYTES
])  # fmt: skip
def test_a_message_of_any_length_arrives_whole(ends, nbytes):
    a, b = ports(ends)
    message = rows_message(nbytes)
    a.send(message)
    a.send(Cancel(request_id="behind"))
    assert b.receive() == message
    assert b.receive() == Cancel(request_id="behind")
    assert b.receive() is None


def test_both_directions_are_apart(ends):
    a, b = ports(ends)
    a.send(rows_message(600))
    b.send(Cancel(request_id="back"))
    assert a.receive() == Cancel(request_id="back")
    assert b.receive() == rows_message(600)


def test_a_message_longer_than_the_ring_passes_a_reader(ends):
    a, b = ports(ends)
    tokens = np.random.default_rng(0).integers(0, 1 << 17, 5000).tolist()
    message = LogitsRequest(request_id="long", tokens=tokens)
    assert len(encode(message)) > 4 * RING_SLOTS * SLOT_BYTES
    sender = threading.Thread(target=a.send, args=(message,))
    sender.start()
    got = None
    while got is None:
        bell = ends[1].bell()
        got = b.receive()
        if got is None:
            assert ends[1].wait(bell, 0, 2000)
    sender.join(5)
    assert not sender.is_alive()
    assert got == message


def test_a_part_alone_is_no_message_yet(ends):
    _, b = ports(ends)
    data = encode(StatusRequest(nonce=5))
    raw = ends[0].sender("b")
    raw.send(Tag.MESSAGE_PART, data[:4])
    assert b.receive() is None
    raw.send(Tag.MESSAGE, data[4:])
    assert b.receive() == StatusRequest(nonce=5)


def test_a_peer_that_takes_nothing_is_reported_in_time(ends):
    a, _ = ports(ends, bound_s=0.05)
    for _ in range(RING_SLOTS):
        a.send(Cancel(request_id="r"))
    with pytest.raises(PeerStalledError, match="b did not answer"):
        a.send(Cancel(request_id="r"))


def test_a_dead_peer_is_heard_out_first(ends):
    a, b = ports(ends)
    a.send(rows_message(700))
    ends[0].close()
    assert b.receive() == rows_message(700)
    with pytest.raises(PeerDeadError):
        b.receive()
    with pytest.raises(PeerDeadError):
        b.send(Cancel(request_id="r"))
