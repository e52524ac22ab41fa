"""Types of the native module: arrays are C-contiguous, results go into arrays of the caller."""

import numpy as np
import numpy.typing as npt

_I32 = npt.NDArray[np.int32]
_F32 = npt.NDArray[np.float32]
_Bool = npt.NDArray[np.bool_]

def belady(ids: _I32, scored: _Bool, capacity: int, n_experts: int, missed: _Bool) -> int:
    """Mark in missed [T, k] what an optimal cache must read of ids [T, k]; returns how many."""

def losses(ids: _I32, p: _F32, run: _I32, weights: _F32, out: npt.NDArray[np.float64]) -> None:
    """Write `losses.LOSSES` [N, 5] of what runs [N, k] in rows [N, C]."""
