"""Frames: what is packed arrives, and no bytes of a peer reach beyond the layout."""

import socket

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fomoe.actors.channel import Fabric, FabricSpec
from fomoe.actors.channel.wire import HEADER, MAGIC, REGION, Kind, MessagePacker, pack_header
from fomoe.errors import ChannelError

SPEC = FabricSpec(("a", "b"), (("a", "b"),), (("x", 1000), ("y", 5)), 4, 100)
U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)


class Loop:
    """A fabric of "b" that reads frames of "a" from a socket."""

    def __enter__(self):
        self.fabric = Fabric.create(SPEC, "b")
        self.near, self.far = socket.socketpair()
        self.inlet = self.fabric.inlet(self.fabric.inbox("a"), self.far.fileno())
        return self

    def __exit__(self, *_):
        self.near.close()
        self.far.close()
        self.fabric.close()

    def feed(self, data):
        """Delivers what is in `data`; whether the stream was refused before it ended."""
        self.near.sendall(data)
        self.near.shutdown(socket.SHUT_WR)
        try:
            while self.inlet.pump(50):
                pass
        except ChannelError:
            return True
        return False


def test_the_header_is_one_cache_line():
    assert HEADER.size == 64
    assert len(pack_header(Kind.PULSE, 2)) == 64


@given(
    tag=U32,
    payload=st.binary(max_size=100),
    regions=st.lists(
        st.tuples(st.just("x"), st.integers(0, 500), st.integers(0, 500)), max_size=64
    ),
    pieces=st.integers(1, 200),
)
@settings(max_examples=50, deadline=None)
def test_a_message_arrives_however_the_stream_is_cut(tag, payload, regions, pieces):
    packer = MessagePacker(SPEC)
    table = packer.check(tag, len(payload), tuple(regions))
    content = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    frame = packer.pack(tag, len(payload), table, 0, 0) + payload
    frame += b"".join(content[at : at + n].tobytes() for _, at, n in regions)
    with Loop() as loop:
        step = max(1, len(frame) // pieces)
        for at in range(0, len(frame), step):
            loop.near.sendall(frame[at : at + step])
            loop.inlet.pump(0)
        assert not loop.feed(b"")
        buffer = bytearray(100)
        assert loop.fabric.receiver("a").try_recv(buffer) == (tag, len(payload))
        assert buffer[: len(payload)] == payload
        expected = np.zeros(1000, np.uint8)
        for _, at, n in regions:
            expected[at : at + n] = content[at : at + n]
        assert (loop.fabric.arena("x") == expected).all()


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ((2**32, 0, ()), "tag 4294967296"),
        ((0, 101, ()), "101 bytes does not fit a slot of 100"),
        ((0, 0, (("z", 0, 1),)), "no arena 'z'"),
        ((0, 0, (("x", -1, 1),)), "outside of arena 'x' of 1000 bytes"),
        ((0, 0, (("x", 0, -1),)), "outside of arena"),
        ((0, 0, (("y", 1, 5),)), "outside of arena 'y' of 5 bytes"),
        ((0, 0, (("x", 0, 0),) * 65), "65 regions"),
    ],
)
def test_a_message_that_does_not_fit_is_not_packed(message, match):
    with pytest.raises(ChannelError, match=match):
        MessagePacker(SPEC).check(*message)


SMALL = st.integers(0, 5)
HEADERS = st.builds(
    lambda kind, regions, tag, nbytes, position, consumed: HEADER.pack(
        MAGIC, kind, regions, tag, nbytes, position, consumed
    ),
    st.integers(0, 3),
    st.integers(0, 66),
    U32,
    st.integers(0, 110),
    SMALL,
    st.integers(0, 1),
)
REGIONS = st.builds(
    REGION.pack, st.integers(0, 2), st.one_of(st.integers(0, 1100), U64), st.integers(0, 1100)
)
STREAMS = st.lists(st.one_of(HEADERS, REGIONS, st.binary(max_size=200)), max_size=12).map(b"".join)


@given(STREAMS)
@example(HEADER.pack(MAGIC, 1, 1, 0, 0, 0, 0) + REGION.pack(0, 999, 2) + b"ab")
@example(HEADER.pack(MAGIC, 1, 1, 0, 0, 0, 0) + REGION.pack(1, 2**64 - 1, 2) + b"ab")
@settings(max_examples=150, deadline=None)
def test_no_stream_writes_beyond_rings_and_arenas(stream):
    with Loop() as loop:
        memory = np.frombuffer(loop.fabric._memory, np.uint8)
        before = memory.copy()
        loop.feed(stream)
        changed = np.flatnonzero(memory != before)
        arena_x, arena_y = (loop.fabric.arena(name).ctypes.data for name in "xy")
        base = memory.ctypes.data
        bell = 4096 + 192
        allowed = np.zeros(memory.size, bool)
        allowed[bell : bell + 4] = True
        allowed[2 * 4096 : 3 * 4096] = True  # the ring
        allowed[arena_x - base : arena_x - base + 1000] = True
        allowed[arena_y - base : arena_y - base + 5] = True
        assert allowed[changed].all()
        del memory
