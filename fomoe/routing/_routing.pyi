"""Types of the native module: arrays are C-contiguous, results go into arrays of the caller."""

import numpy as np
import numpy.typing as npt

_F32 = npt.NDArray[np.float32]
_I32 = npt.NDArray[np.int32]

def softmax(scores: _F32, out: _F32) -> int:
    """Rows of `scores` into `out` [T, E]; returns the first row that is not finite, -1 if none."""

def route(scores: _F32, ids: _I32, weights: _F32) -> int:
    """Route [T, E] into ids and weights [T, k]; returns the first row not finite, -1 if none."""

def predict(scores: _F32, k: int, ids: _I32, margins: _F32) -> int:
    """Rank the union of the top-k into ids and margins [E].

    Returns how many, or -1 - row for a row that is not finite.
    """

def group(
    ids: _I32, experts: _I32, pair_start: _I32, pair_token: _I32, order: _I32, ranks: _I32
) -> int:
    """Group ids [T, k]; P = T * k entries in each array, P + 1 in pair_start; returns experts."""

class Rule:
    """A rule as native code runs it; `limit` is its threshold, price or weight."""

    def __init__(
        self,
        kind: str,
        limit: float,
        kappa: float,
        guarded: int,
        budget: int,
        sensitivities: list[float],
    ) -> None: ...

def choose(
    rule: Rule,
    layer: int,
    scores: _F32,
    resident: npt.NDArray[np.bool_],
    ids: _I32,
    weights: _F32,
    substituted: npt.NDArray[np.bool_],
) -> int:
    """Route [T, E] by a rule into [T, k]; returns the first row not finite, -1 if none."""
