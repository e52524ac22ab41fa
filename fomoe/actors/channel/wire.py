"""Frames on a socket between two boxes, little endian; inlet.h is the end that reads them.

A frame is a header of 64 bytes and, if it is a message, a region table, the payload, and the bytes
of the regions in the order of the table:

    header   magic u32 | kind u8 | 0 u8 | regions u16 | tag u32 | payload bytes u32
             | position u64 | consumed u64 | 32 zero bytes
    region   arena index u32 | 0 u32 | offset u64 | bytes u64

`position` counts the messages of this direction from 0; `consumed` are the messages of the other
direction that its receiver has taken out of its ring, which gives the sender that many slots back.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from fomoe.actors.channel.ports import Regions
from fomoe.actors.channel.spec import FabricSpec
from fomoe.errors import ChannelError

MAGIC = 0x656F6D66  # "fmoe"
MAX_REGIONS = 64
HEADER = struct.Struct("<IBxHIIQQ32x")
REGION = struct.Struct("<IxxxxQQ")


class Kind(IntEnum):
    """What a frame is for; each one also carries `consumed`."""

    PULSE = 0  # says "I live" and gives credit
    MESSAGE = 1
    BELL = 2


def pack_header(kind: Kind, consumed: int) -> bytes:
    """A frame without a body."""
    return HEADER.pack(MAGIC, kind, 0, 0, 0, 0, consumed)


class MessagePacker:
    """Packs message frames for one spec and refuses what the other end would refuse."""

    def __init__(self, spec: FabricSpec) -> None:
        self._slot_bytes = spec.slot_bytes
        self._arenas = {name: (i, nbytes) for i, (name, nbytes) in enumerate(spec.arenas)}

    def check(self, tag: int, payload_bytes: int, regions: Regions) -> bytes:
        """The region table of a message that fits the spec; ChannelError when it does not."""
        if not 0 <= tag < 1 << 32:
            raise ChannelError(f"tag {tag} is not in 0 to 4,294,967,295")
        if payload_bytes > self._slot_bytes:
            raise ChannelError(
                f"a message of {payload_bytes} bytes does not fit a slot of {self._slot_bytes}; "
                "put it into an arena"
            )
        if len(regions) > MAX_REGIONS:
            raise ChannelError(f"{len(regions)} regions in one message, at most {MAX_REGIONS}")
        return b"".join(self._pack_region(*region) for region in regions)

    def _pack_region(self, name: str, offset: int, nbytes: int) -> bytes:
        if name not in self._arenas:
            raise ChannelError(f"no arena {name!r} in the fabric")
        index, size = self._arenas[name]
        if offset < 0 or nbytes < 0 or offset + nbytes > size:
            raise ChannelError(
                f"region {offset}+{nbytes} lies outside of arena {name!r} of {size} bytes"
            )
        return REGION.pack(index, offset, nbytes)

    @staticmethod
    def pack(tag: int, payload_bytes: int, table: bytes, position: int, consumed: int) -> bytes:
        """Header and region table of a message; its payload and region bytes follow."""
        regions = len(table) // REGION.size
        return (
            HEADER.pack(MAGIC, Kind.MESSAGE, regions, tag, payload_bytes, position, consumed)
            + table
        )
