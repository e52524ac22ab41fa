"""Types of the native module: a layer step from router scores to reads and entries."""

import numpy as np
import numpy.typing as npt

from fomoe.engine.ahead import AheadArrays
from fomoe.engine.decisions import Decisions
from fomoe.engine.transfers import SegmentSlots
from fomoe.engine.waves import Priorities, WaveArrays
from fomoe.residency._residency import LogicalCaches, Planner
from fomoe.routing._routing import Rule

_F32 = npt.NDArray[np.float32]
_I32 = npt.NDArray[np.int32]

_U64 = npt.NDArray[np.uint64]

def landed(words: _U64, entries: npt.NDArray[np.void], ready: npt.NDArray[np.uint8]) -> int:
    """Set `ready[i]` to whether entry i's read has landed; returns how many have.

    A read has landed when word `slot` of `words` [slots], loaded with acquire order, has reached
    the entry's generation. IndexError for a slot that is not there.
    """

def part_addresses(parts: _U64, entries: npt.NDArray[np.void], out: _U64) -> None:
    """Write where the parts of the entries' experts lie: out [3, n] = parts[:, expert] + address.

    `parts` [3, E] holds where gate, up and down of each expert would begin if its slot had address
    0. IndexError for an expert that is not there.
    """

class Decider:
    """Decides many sequences' tokens of a layer with the GIL released."""

    def __init__(
        self, caches: LogicalCaches, rule: Rule, k: int, threads: int, own: Decisions
    ) -> None: ...
    def decide(
        self,
        layer: int,
        scores: _F32,
        ids: _I32 | None,
        sequences: _I32,
        prices: _F32 | None,
        out: Decisions | None,
    ) -> int:
        """Write decisions into `out`, None: `own`; returns the first row not finite, or -1.

        With such a row nothing is decided.
        """

class StepArrays:
    """Where a step is written for the device, in place.

    Entry i serves pairs `pair_start[i]` to `pair_start[i + 1]`, of which `pair_token` [P] names the
    tokens; `order[t]` lists token t's pairs in ascending expert id, `weights[t]` their weights.
    `entries` are records of `ENTRY`. `order` and `weights` are [T, k] of the largest step.
    """

    def __init__(
        self,
        order: _I32,
        weights: _F32,
        pair_token: _I32,
        pair_start: _I32,
        entries: npt.NDArray[np.void],
    ) -> None: ...

class WavePlanner:
    def __init__(
        self,
        planner: Planner,
        segments: list[SegmentSlots],
        arrays: WaveArrays,
        ahead: AheadArrays,
        priorities: Priorities,
    ) -> None: ...
    def decide(
        self,
        layer: int,
        scores: _F32,
        tokens: npt.NDArray[np.int64],
        decision_hash: npt.NDArray[np.uint64],
        out: StepArrays,
    ) -> int: ...
    def place(
        self,
        layer: int,
        ids: _I32,
        weights: _F32,
        substituted: npt.NDArray[np.bool_],
        out: StepArrays,
    ) -> int: ...
    def decide_by(
        self,
        layer: int,
        scores: _F32,
        decider: Decider,
        prices: _F32 | None,
        out: StepArrays,
    ) -> int: ...
    def read_later(self, layer: int, experts: _I32) -> int: ...
    def picks(self, ids: _I32, weights: _F32) -> None: ...
    def wave(self) -> int: ...
    def answered(self, device: int, aborted: bool) -> None: ...
    def is_tight(self, layer: int) -> bool: ...
    def ended(self, copies: npt.NDArray[np.void]) -> None: ...
    def give_up_guesses(self) -> None: ...
    def look_ahead(self, layer: int, scores: _F32, depth: int) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def n_experts(self) -> int: ...
    @property
    def step_copies(self) -> int: ...
    @property
    def ahead_copies(self) -> int: ...
