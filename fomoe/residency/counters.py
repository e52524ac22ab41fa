"""What the residency did, counted per layer."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from fomoe.types import Tier


@dataclass(frozen=True, slots=True, eq=False)
class Counters:
    """Totals since the start, int64, layers first.

    Attributes:
        lookups: [L, 3] wanted experts by the `Tier` that they were found in; the last column is
            demand reads from NVMe.
        prefetches: [L, 3] prefetches by source tier (the first column stays 0).
        prefetch_used: [L] prefetched, then wanted while still on the device.
        prefetch_wasted: [L] prefetched, then gone without being wanted.
        evictions: [L] entries that left a device slot, by the victim's layer.
        demotions: [L] those of them that moved to RAM.
        ram_drops: [L] entries that left a RAM slot to nowhere, by their layer.
    """

    lookups: npt.NDArray[np.int64]
    prefetches: npt.NDArray[np.int64]
    prefetch_used: npt.NDArray[np.int64]
    prefetch_wasted: npt.NDArray[np.int64]
    evictions: npt.NDArray[np.int64]
    demotions: npt.NDArray[np.int64]
    ram_drops: npt.NDArray[np.int64]

    @classmethod
    def zeros(cls, n_layers: int) -> Counters:
        """Return counters that have seen nothing."""
        by_tier = ("lookups", "prefetches")
        return cls(
            **{
                field.name: np.zeros(
                    (n_layers, len(Tier)) if field.name in by_tier else n_layers, dtype=np.int64
                )
                for field in fields(cls)
            }
        )

    def copy(self) -> Counters:
        """Return a copy that no longer changes."""
        return Counters(**{field.name: getattr(self, field.name).copy() for field in fields(self)})
