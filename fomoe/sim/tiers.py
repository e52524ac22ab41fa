"""Offline scores of a device and a RAM tier over a trace of wanted experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.residency.policy import EvictionPolicy
from fomoe.residency.residency import Residency
from fomoe.residency.topology import RamPolicy, Topology
from fomoe.types import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class TierScore:
    """What a trace costs: shares of lookups by tier, and moved experts per lookup.

    `device + ram + nvme == 1`. `promoted` experts go from RAM to the device, `demoted` ones back;
    times expert bytes and lookups per token, these are bytes per token.
    """

    device: float
    ram: float
    nvme: float
    demoted: float

    @property
    def link(self) -> float:
        """Experts over the host link per lookup, both ways: every miss comes, demotions go."""
        return self.ram + self.nvme + self.demoted


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSetup:
    """A cache to score: slots per layer and tier, and the rules."""

    n_experts: int
    device_slots: int
    ram_slots: int
    policy: EvictionPolicy
    ram: RamPolicy = "exclusive"


def replay_tiers(ids: npt.NDArray[np.int32], setup: TierSetup, warmup: int = 0) -> TierScore:
    """Run a trace through a residency of one device and one size class.

    Args:
        ids: int32 [T, L, k], each token's wanted experts, distinct in a row.
        setup: the cache.
        warmup: first tokens that fill the cache and are not scored.

    Returns:
        Shares over the scored tokens.
    """
    n_tokens, n_layers, _ = ids.shape
    residency = Residency(_topology(n_layers, setup), setup.policy, setup.ram)
    before = residency.counters.copy()
    wanted = np.sort(ids, axis=2)
    for token in range(n_tokens):
        if token == warmup:
            before = residency.counters.copy()
        for layer in range(n_layers):
            residency.plan(layer, wanted[token, layer])
            residency.release(layer)
    after = residency.counters
    by_tier = (after.lookups - before.lookups).sum(axis=0)
    lookups = max(int(by_tier.sum()), 1)
    return TierScore(
        device=int(by_tier[Tier.DEVICE]) / lookups,
        ram=int(by_tier[Tier.RAM]) / lookups,
        nvme=int(by_tier[Tier.NVME]) / lookups,
        demoted=int((after.demotions - before.demotions).sum()) / lookups,
    )


def _topology(n_layers: int, setup: TierSetup) -> Topology:
    zeros = np.zeros(n_layers, dtype=np.int32)
    return Topology(
        n_layers=n_layers,
        n_experts=setup.n_experts,
        layer_device=zeros,
        layer_class=zeros,
        device_slots={(0, 0): setup.device_slots * n_layers},
        ram_slots={(0, 0): setup.ram_slots * n_layers},
        device_node=(0,),
    )
