"""Types of the native module: the rules of `Residency` on the arrays of a `State`."""

import numpy as np
import numpy.typing as npt

from fomoe.residency.logical import LogicalCaches as _Owner
from fomoe.residency.logical import LogicalRules
from fomoe.residency.plans import PlanArrays
from fomoe.residency.policy import EvictionPolicy
from fomoe.residency.state import State

_I32 = npt.NDArray[np.int32]
_I64 = npt.NDArray[np.int64]

class Planner:
    def __init__(
        self, state: State, plan: PlanArrays, policy: EvictionPolicy, is_exclusive: bool
    ) -> None: ...
    def plan(self, layer: int, wanted: _I32) -> int: ...
    def prefetch(self, layer: int, candidates: _I32, limit: int, eager: bool) -> int: ...
    def release(self, layer: int) -> None: ...
    def release_some(self, layer: int, experts: _I32) -> None: ...
    def forget(self, layer: int, experts: _I32) -> None: ...
    def capacity(self, layer: int) -> int: ...

def observe(layer: int, ids: _I32, tokens: _I64, decision_hash: npt.NDArray[np.uint64]) -> int: ...

class LogicalCaches:
    """The rules on the arrays of a `fomoe.residency.logical.LogicalCaches`."""

    def __init__(self, owner: _Owner, rules: LogicalRules) -> None: ...
    def commit(
        self, layer: int, ids: _I32, rows: _I32, probabilities: npt.NDArray[np.float32]
    ) -> None: ...
