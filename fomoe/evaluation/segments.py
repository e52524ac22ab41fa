"""Parts of a decoded text by how long the policy has been at work."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Segment:
    """Decode steps `start` to `stop` - 1 of a document, counted from its first; None: no end."""

    name: str
    start: int
    stop: int | None

    def mask(self, steps: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """Return bool [N]: which decode steps [N] lie in the segment."""
        inside: npt.NDArray[np.bool_] = steps >= self.start
        return inside if self.stop is None else inside & (steps < self.stop)


# Cold: the cache still holds what the exact prompt left there. Long: drift has had its time.
SEGMENTS = (Segment("cold", 0, 100), Segment("warm", 100, 512), Segment("long", 512, None))
