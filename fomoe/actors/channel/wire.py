"""Frames on a socket between two boxes: a fixed header, a region table, payload, region bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from fomoe.actors.channel.ports import Regions
from fomoe.actors.channel.spec import FabricSpec
from fomoe.errors import ChannelError

MAGIC = 0x656F6D66  # "fmoe"
MAX_REGIONS = 64
# magic, kind, pad, regions, tag, payload bytes, position, consumed; padded to 64 bytes
HEADER = struct.Struct("<IBxHIIQQ32x")
REGION = struct.Struct("<IxxxxQQ")  # arena index, offset, nbytes


class Kind(IntEnum):
    """What a frame is for; each one also carries the sender's `consumed` count."""

    PULSE = 0  # says "I live" and gives credit
    MESSAGE = 1
    BELL = 2


@dataclass(frozen=True, slots=True)
class Frame:
    """A header whose numbers were checked against the spec.

    `position` counts the messages of this direction, `consumed` those of the other direction
    whose slots are free again.
    """

    kind: Kind
    tag: int
    payload_bytes: int
    regions: int
    position: int
    consumed: int


def pack_header(kind: Kind, position: int, consumed: int) -> bytes:
    """A header without a body."""
    return HEADER.pack(MAGIC, kind, 0, 0, 0, position, consumed)


class Codec:
    """Packs and checks frames for one spec; what does not fit it is a ChannelError."""

    def __init__(self, spec: FabricSpec) -> None:
        self._slot_bytes = spec.slot_bytes
        self._arenas = spec.arenas
        self._arena_index = {name: (i, size) for i, (name, size) in enumerate(spec.arenas)}

    def pack_message(
        self, tag: int, payload_bytes: int, regions: Regions, position: int, consumed: int
    ) -> bytes:
        """Header and region table of a message; its payload and region bytes follow."""
        if not 0 <= tag < 1 << 32:
            raise ChannelError(f"tag {tag} is not in 0 to 4,294,967,295")
        if payload_bytes > self._slot_bytes:
            raise ChannelError(
                f"a message of {payload_bytes} bytes does not fit a slot of {self._slot_bytes}; "
                "put it into an arena"
            )
        if len(regions) > MAX_REGIONS:
            raise ChannelError(f"{len(regions)} regions in one message, at most {MAX_REGIONS}")
        table = []
        for name, offset, nbytes in regions:
            if name not in self._arena_index:
                raise ChannelError(f"no arena {name!r} in the fabric")
            index, size = self._arena_index[name]
            self._check_range(name, size, offset, nbytes)
            table.append(REGION.pack(index, offset, nbytes))
        head = HEADER.pack(
            MAGIC, Kind.MESSAGE, len(regions), tag, payload_bytes, position, consumed
        )
        return b"".join((head, *table))

    def parse_header(self, header: bytes | bytearray) -> Frame:
        """Checks 64 bytes that came from the peer."""
        magic, kind, regions, tag, payload_bytes, position, consumed = HEADER.unpack(header)
        if magic != MAGIC or kind not in Kind.__members__.values():
            raise ChannelError(f"not a frame: magic {magic:#x}, kind {kind}")
        if payload_bytes > self._slot_bytes or regions > MAX_REGIONS:
            raise ChannelError(
                f"frame out of bounds: payload of {payload_bytes} bytes (slots have "
                f"{self._slot_bytes}), {regions} regions (at most {MAX_REGIONS})"
            )
        if kind != Kind.MESSAGE and (payload_bytes or regions):
            raise ChannelError(f"a frame of kind {kind} must not have a body")
        return Frame(Kind(kind), tag, payload_bytes, regions, position, consumed)

    def parse_regions(self, table: bytes | bytearray | memoryview) -> list[tuple[str, int, int]]:
        """Checks a region table that came from the peer."""
        found = []
        for index, offset, nbytes in REGION.iter_unpack(table):
            if index >= len(self._arenas):
                raise ChannelError(f"region in arena {index}, there are {len(self._arenas)}")
            name, size = self._arenas[index]
            self._check_range(name, size, offset, nbytes)
            found.append((name, offset, nbytes))
        return found

    @staticmethod
    def _check_range(name: str, size: int, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > size:
            raise ChannelError(
                f"region {offset}+{nbytes} lies outside of arena {name!r} of {size} bytes"
            )
