"""The native reduction of router rows in NumPy: the definition of its bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.routing.reference import softmax


def reduce(
    scores: npt.NDArray[np.float32], candidates: int
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return ids and probabilities [T, C], best first, and the tail's mass [T].

    The order is score descending, then lower id; the tail is added up in float64 by ascending id.
    """
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :candidates]
    p = softmax(scores)
    best = np.take_along_axis(p, ids, axis=1)
    np.put_along_axis(p, ids, np.float32(0), axis=1)
    tail = np.cumsum(p, axis=1, dtype=np.float64)[:, -1].astype(np.float32)
    return ids.astype(np.uint16), best, tail
