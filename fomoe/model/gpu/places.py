"""Where the two halves of a layer hand over what the other one needs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fomoe.model.buffers import F32


class Places(NamedTuple):
    """Arrays in memory that a device has pinned; T is that of the longest pass.

    Attributes:
        x, q, s: the experts' input in the forms of `kernels.gpu.step.Rows`: float32 [T, D],
            int8 [T, D] and float32 [T, D / 32, 2].
        scores: float32 [T, E].
        sums: float32 [T, D], of the routed experts.
        shift: what the device adds to the host's addresses of them.
    """

    x: F32
    q: npt.NDArray[np.int8]
    s: F32
    scores: F32
    sums: F32
    shift: int
