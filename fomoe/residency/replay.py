"""Offline scores of cache policies over a trace of wanted experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.residency.policy import EvictionPolicy
from fomoe.residency.residency import Residency
from fomoe.residency.topology import RamPolicy, Topology
from fomoe.types import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayScore:
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
class ReplaySetup:
    """A cache to score: slots per layer and tier, and the rules."""

    n_experts: int
    device_slots: int
    ram_slots: int
    policy: EvictionPolicy
    ram: RamPolicy = "exclusive"


def replay(ids: npt.NDArray[np.int32], setup: ReplaySetup, warmup: int = 0) -> ReplayScore:
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
    return ReplayScore(
        device=int(by_tier[Tier.DEVICE]) / lookups,
        ram=int(by_tier[Tier.RAM]) / lookups,
        nvme=int(by_tier[Tier.NVME]) / lookups,
        demoted=int((after.demotions - before.demotions).sum()) / lookups,
    )


def _topology(n_layers: int, setup: ReplaySetup) -> Topology:
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


def synthetic_trace(
    n_tokens: int, n_layers: int, seed: int, *, n_experts: int = 512, top_k: int = 10
) -> npt.NDArray[np.int32]:
    """Make a trace whose LRU hit rates resemble a large model's.

    An expert's score is popularity + topic + context + noise; topic and context are first-order
    autoregressive with half-lives of 150 and 6 tokens. The weights give an LRU of 50, 86 and 128
    slots per layer of 512 experts 61, 72 and 80 %; measured were 60 and 72 % (FOMOE, 397B) and
    81 % (llama.cpp #27861, 512 experts).

    Returns:
        int32 [n_tokens, n_layers, top_k], distinct in a row.
    """
    rng = np.random.default_rng(seed)
    shape = n_layers, n_experts
    popularity, topic, context = rng.normal(size=(3, *shape))
    ids = np.empty((n_tokens, n_layers, top_k), dtype=np.int32)
    for token in range(n_tokens):
        topic = _drift(topic, 150, rng)
        context = _drift(context, 6, rng)
        score = 0.3 * popularity + 0.9 * topic + 0.8 * context + 0.9 * rng.normal(size=shape)
        ids[token] = np.argpartition(score, -top_k, axis=1)[:, -top_k:]
    return ids


def _drift(
    state: npt.NDArray[np.float64], half_life: float, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Advance a stationary autoregressive process of unit variance by one token."""
    keep = 0.5 ** (1 / half_life)
    drifted: npt.NDArray[np.float64] = keep * state + np.sqrt(1 - keep**2) * rng.normal(
        size=state.shape
    )
    return drifted
