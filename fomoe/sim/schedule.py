"""How the engine orders a token's work, and what a simulation of it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fomoe.errors import ConfigError
from fomoe.sim.lanes import F64

Split = Literal["layers", "experts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How the engine orders its work.

    Attributes:
        overlap: False runs one job after the other (the serial twin).
        together: arrivals are computed when the last one has come, not as each lands.
        split: layers alternate between devices (ping-pong), or all devices own a part of each
            layer's experts (expert-parallel).
        recall: share of a layer's misses that were guessed a layer ahead; 0: no guesses.
        waste: wrong guesses per right one.
        depth: how many layers ahead guesses are made; the nearer layer's are read first.
        decay: what of the recall is left per further layer ahead.
        pieces: requests that an expert is read in.
        cpu_arm: experts in RAM are computed by the host's cores, not copied.
    """

    overlap: bool = True
    together: bool = False
    split: Split = "layers"
    recall: float = 0.0
    waste: float = 0.2
    depth: int = 1
    decay: float = 0.95
    pieces: int = 3
    cpu_arm: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.recall <= 1 and self.waste >= 0 and 0 < self.decay <= 1):
            raise ConfigError(f"recall {self.recall}, waste {self.waste}, decay {self.decay}")
        if self.depth < 1 or self.pieces < 1:
            raise ConfigError(f"depth {self.depth}, pieces {self.pieces}: at least 1")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What a simulation gave, float64 [lanes] each.

    Attributes:
        wall: seconds of a token.
        busy: by resource, seconds of work; a mean over equal ones, so never above `wall`.
        read_bytes: from the drives, guesses included; `wasted_bytes` of them for nothing.
        link_bytes: to devices.
    """

    wall: F64
    busy: dict[str, F64]
    read_bytes: F64
    wasted_bytes: F64
    link_bytes: F64

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over all lanes in turn."""
        return float(len(self.wall) / self.wall.sum())

    @property
    def binds(self) -> str:
        """The resource that works for the greatest part of the time."""
        return max(self.busy, key=lambda name: float(self.busy[name].sum()))

    def share(self, name: str) -> float:
        """How much of the time a resource works."""
        return float(self.busy[name].sum() / self.wall.sum())
