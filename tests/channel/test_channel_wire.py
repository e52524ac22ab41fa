"""Frames: what is packed comes back, and no bytes of a peer reach beyond the spec."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.actors.channel import FabricSpec
from fomoe.actors.channel.wire import HEADER, MAGIC, REGION, Codec, Kind, pack_header
from fomoe.errors import ChannelError

SPEC = FabricSpec(("a", "b"), (("a", "b"),), (("x", 1000), ("y", 5)), 4, 100)
CODEC = Codec(SPEC)
U64 = st.integers(0, 2**64 - 1)


def test_the_header_is_one_cache_line():
    assert HEADER.size == 64
    assert len(pack_header(Kind.PULSE, 1, 2)) == 64


@given(
    tag=st.integers(0, 2**32 - 1),
    nbytes=st.integers(0, 100),
    regions=st.lists(
        st.tuples(st.just("x"), st.integers(0, 500), st.integers(0, 500)), max_size=64
    ),
    position=U64,
    consumed=U64,
)
def test_a_message_comes_back(tag, nbytes, regions, position, consumed):
    packed = CODEC.pack_message(tag, nbytes, tuple(regions), position, consumed)
    frame = CODEC.parse_header(packed[:64])
    assert frame.kind is Kind.MESSAGE
    assert (frame.tag, frame.payload_bytes, frame.regions) == (tag, nbytes, len(regions))
    assert (frame.position, frame.consumed) == (position, consumed)
    assert CODEC.parse_regions(packed[64:]) == regions


@given(st.one_of(st.binary(min_size=64, max_size=64), st.binary(min_size=60, max_size=60)))
def test_any_header_is_in_bounds_or_refused(data):
    header = data if len(data) == 64 else MAGIC.to_bytes(4, "little") + data
    try:
        frame = CODEC.parse_header(header)
    except ChannelError:
        return
    assert frame.payload_bytes <= 100
    assert frame.regions <= 64
    assert frame.kind is Kind.MESSAGE or frame.payload_bytes == frame.regions == 0


@given(st.integers(0, 3), U64, U64)
def test_any_region_is_in_bounds_or_refused(index, offset, nbytes):
    inside = index < 2 and offset + nbytes <= SPEC.arenas[index][1]
    table = REGION.pack(index, offset, nbytes)
    if inside:
        assert CODEC.parse_regions(table) == [(SPEC.arenas[index][0], offset, nbytes)]
    else:
        with pytest.raises(ChannelError):
            CODEC.parse_regions(table)
