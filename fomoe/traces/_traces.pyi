"""Types of the native module: arrays are C-contiguous, results go into arrays of the caller."""

import numpy as np
import numpy.typing as npt

_F32 = npt.NDArray[np.float32]

class Reducer:
    """Cuts rows of router scores down to their best candidates, with scratch of its own."""

    def __init__(self, n_experts: int, candidates: int) -> None: ...
    def reduce(
        self,
        scores: _F32,
        layer: int,
        ids: npt.NDArray[np.uint16],
        probabilities: _F32,
        tail: _F32,
    ) -> int:
        """Write scores [T, E] to the first T rows of `layer` in [L, R, C] and tail [L, R].

        Returns the first row that is not finite, -1 if none. IndexError where they do not fit.
        """
