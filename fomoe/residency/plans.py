"""What the residency decides, for others to carry out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.types import ExpertKey, Tier


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring one expert into a device slot.

    First the victim's bytes go to RAM slot `demoted_to`, then the expert's bytes come in. A
    demotion must be carried out even if the read behind it is cancelled. With an exclusive RAM
    tier and `source` RAM, `demoted_to == ram_slot` means that the two exchange places.

    Attributes:
        expert: id inside the plan's layer.
        slot: index in the pool of the layer's (device, class).
        source: Tier.RAM or Tier.NVME.
        ram_slot: where it lies in the (node, class) pool if `source` is RAM, else -1.
        victim: what leaves the slot, possibly of another layer of the pool; None if it was free.
        demoted_to: RAM slot that the victim moves to; -1 if dropped or none.
        kept_in: RAM slot that keeps a copy of what is read (inclusive RAM only), else -1.
    """

    expert: int
    slot: int
    source: Tier
    ram_slot: int = -1
    victim: ExpertKey | None = None
    demoted_to: int = -1
    kept_in: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One layer's step: what is there, and what must come.

    `hits` and `hit_slots` are int32 of one length: experts on the device, ascending, and their
    slots. `fetches` are to be carried out in order: a RAM slot that one of them reads may be
    overwritten by a later one, of this plan or the next.
    """

    layer: int
    hits: npt.NDArray[np.int32]
    hit_slots: npt.NDArray[np.int32]
    fetches: tuple[Fetch, ...]


# `Fetch` as a record; the victim is -1, -1 if there is none.
FETCH_RECORD = np.dtype(
    [
        ("expert", "<i4"),
        ("slot", "<i4"),
        ("source", "<i4"),
        ("ram_slot", "<i4"),
        ("victim_layer", "<i4"),
        ("victim", "<i4"),
        ("demoted_to", "<i4"),
        ("kept_in", "<i4"),
    ]
)


class PlanArrays:
    """Where the native rules leave a plan until the next one; room for E entries each.

    `hits` and `hit_slots` are int32, `fetches` are of `FETCH_RECORD`.
    """

    def __init__(self, n_experts: int) -> None:
        self.hits = np.empty(n_experts, dtype=np.int32)
        self.hit_slots = np.empty(n_experts, dtype=np.int32)
        self.fetches = np.empty(n_experts, dtype=FETCH_RECORD)

    def plan(self, layer: int, n_hits: int, n_fetches: int) -> Plan:
        """Return a copy as objects."""
        fetches = tuple(_fetch(*row) for row in self.fetches[:n_fetches].tolist())
        return Plan(layer, self.hits[:n_hits].copy(), self.hit_slots[:n_hits].copy(), fetches)


def _fetch(expert: int, slot: int, source: int, ram_slot: int, *rest: int) -> Fetch:
    victim_layer, victim, demoted_to, kept_in = rest
    loser = ExpertKey(victim_layer, victim) if victim >= 0 else None
    return Fetch(expert, slot, Tier(source), ram_slot, loser, demoted_to, kept_in)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a preloaded expert goes: `slot` in the device or RAM pool of its layer, by `tier`."""

    key: ExpertKey
    tier: Tier
    slot: int
