"""What a fabric consists of, and the handle by which other processes find it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from fomoe.errors import ConfigError

MAX_NAME = 64


class FabricHandle(TypedDict):
    """Where a fabric lies: open file `fd` of process `pid`, valid while that process keeps it.

    `starttime` (clock ticks since boot) and `boot_id` tell a recycled pid or another machine
    apart; `fabric_id` (hex) tells two fabrics apart. Made of plain values, so msgpack carries it.
    """

    pid: int
    starttime: int
    fd: int
    boot_id: str
    fabric_id: str
    spec: dict[str, Any]


@dataclass(frozen=True, slots=True)
class FabricSpec:
    """Processes, one-way rings between them and named arenas; equal on all boxes of an engine.

    `rings` are (from, to) pairs, `arenas` (name, bytes) pairs. A ring holds `ring_slots` messages
    of up to `slot_bytes` bytes; bigger data goes into an arena. Raises ConfigError.
    """

    processes: tuple[str, ...]
    rings: tuple[tuple[str, str], ...]
    arenas: tuple[tuple[str, int], ...] = ()
    ring_slots: int = 64
    slot_bytes: int = 16384

    def __post_init__(self) -> None:
        """Refuses what could not be laid out."""
        names = [name for name, _ in self.arenas]
        for what, items in (("process", self.processes), ("ring", self.rings), ("arena", names)):
            if len(set(items)) != len(items):
                raise ConfigError(f"fabric: a {what} is named twice in {list(items)}")
        for name in (*self.processes, *names):
            if not 0 < len(name.encode()) <= MAX_NAME:
                raise ConfigError(f"fabric: name {name!r} must have 1 to {MAX_NAME} bytes")
        for frm, to in self.rings:
            if frm == to or frm not in self.processes or to not in self.processes:
                raise ConfigError(f"fabric: ring {frm!r} -> {to!r} joins no two known processes")
        for name, nbytes in self.arenas:
            if not 0 < nbytes < 1 << 46:
                raise ConfigError(f"fabric: arena {name!r} of {nbytes:,} bytes is out of range")
        if not (0 < self.ring_slots <= 1 << 16 and 0 < self.slot_bytes <= 1 << 24):
            raise ConfigError(
                f"fabric: ring_slots {self.ring_slots} must be 1 to 65,536 and slot_bytes "
                f"{self.slot_bytes} 1 to 16,777,216"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that msgpack and json carry."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> FabricSpec:
        """The inverse of `to_dict`; also takes lists where tuples were."""
        return cls(
            processes=tuple(str(name) for name in plain["processes"]),
            rings=tuple((str(frm), str(to)) for frm, to in plain["rings"]),
            arenas=tuple((str(name), int(nbytes)) for name, nbytes in plain["arenas"]),
            ring_slots=int(plain["ring_slots"]),
            slot_bytes=int(plain["slot_bytes"]),
        )

    def digest(self) -> bytes:
        """32 bytes that two processes compare before they trust each other's offsets."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).digest()

    def process_index(self, name: str) -> int:
        """Row of a process in the process table; ConfigError when it is not in the spec."""
        if name not in self.processes:
            raise ConfigError(f"fabric: no process {name!r}; there are {list(self.processes)}")
        return self.processes.index(name)

    def ring_index(self, frm: str, to: str) -> int:
        """Number of the ring from `frm` to `to`; ConfigError when the spec has none."""
        if (frm, to) not in self.rings:
            raise ConfigError(f"fabric: the spec has no ring {frm!r} -> {to!r}")
        return self.rings.index((frm, to))

    def neighbours(self, name: str) -> tuple[str, ...]:
        """The processes that `name` shares a ring with, in the order of the spec."""
        joined = {frm if to == name else to for frm, to in self.rings if name in (frm, to)}
        return tuple(other for other in self.processes if other in joined)
