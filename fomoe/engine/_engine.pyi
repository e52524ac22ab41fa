"""Types of the native module: a layer step from router scores to reads and entries."""

import numpy as np
import numpy.typing as npt

from fomoe.engine.transfers import SegmentSlots
from fomoe.engine.waves import WaveArrays
from fomoe.residency._residency import Planner

_F32 = npt.NDArray[np.float32]
_I32 = npt.NDArray[np.int32]

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
        demand: int,
        prefetch: int,
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
    def wave(self) -> int: ...
    def look_ahead(self, layer: int, scores: _F32) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def n_experts(self) -> int: ...
