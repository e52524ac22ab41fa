"""What each layer of each token asks of the tiers: the product's own rules over router scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError
from fomoe.residency import LFRU, Residency
from fomoe.residency.policy import EvictionPolicy
from fomoe.residency.topology import RamPolicy, Topology
from fomoe.routing import Route
from fomoe.types import ExpertKey, Tier

Counts = npt.NDArray[np.int16]

# Half-lives in tokens and weights of the parts of a score. They give an LRU of 50, 86 and 128
# slots per layer of 512 experts 61, 72 and 80 % at top-10; measured were 60 and 72 % (FOMOE, 397B)
# and 81 % (llama.cpp #27861). The sharpness gives cache-aware routing at 0.35 its 6 % of reads.
_TOPIC, _CONTEXT = 150, 6
_SHARPNESS = 1.2


class Rule(Protocol):
    """A routing rule; see `fomoe.routing`."""

    def route(
        self, logits: npt.NDArray[np.float32], k: int, resident: npt.NDArray[np.bool_]
    ) -> Route:
        """Choose k experts per token."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A layer's share of the tiers, in slots, and the rules of who stays."""

    device_slots: float
    ram_slots: float
    policy: EvictionPolicy = field(default_factory=LFRU)
    ram: RamPolicy = "exclusive"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loads:
    """Activations by tier, of the devices that own them: int16 [T, L, D] each.

    `demoted` are experts that go back from a device to RAM. `substituted` is the share of
    activations that ran in another's place, `substitutes_in_ram` the share of them from RAM.
    """

    device: Counts
    ram: Counts
    nvme: Counts
    demoted: Counts
    substituted: float = 0.0
    substitutes_in_ram: float = 0.0

    @property
    def shares(self) -> tuple[float, float, float]:
        """Shares of activations by tier."""
        sums = [float(part.sum()) for part in (self.device, self.ram, self.nvme)]
        total = max(sum(sums), 1.0)
        return sums[0] / total, sums[1] / total, sums[2] / total


def synthetic_scores(
    n_tokens: int, n_layers: int, n_experts: int, seed: int
) -> npt.NDArray[np.float32]:
    """Return router scores float32 [T, L, E] whose locality resembles a large model's.

    A score is popularity + topic + context + noise; topic and context are first-order
    autoregressive.
    """
    rng = np.random.default_rng(seed)
    popularity, topic, context = rng.standard_normal((3, n_layers, n_experts), np.float32)
    scores = np.empty((n_tokens, n_layers, n_experts), np.float32)
    for token in range(n_tokens):
        new = rng.standard_normal((3, n_layers, n_experts), np.float32)
        for state, half_life, noise in ((topic, _TOPIC, new[0]), (context, _CONTEXT, new[1])):
            keep = 0.5 ** (1 / half_life)
            state *= np.float32(keep)
            state += np.float32(np.sqrt(1 - keep**2)) * noise
        np.add(0.3 * popularity + 0.9 * topic, 0.8 * context + 0.9 * new[2], out=scores[token])
    scores *= np.float32(_SHARPNESS)
    return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """How scores are replayed: experts per token, tokens that only fill, devices, layers."""

    top_k: int
    warmup: int
    devices: int
    layers: int


def replay_loads(
    scores: npt.NDArray[np.float32], cache: Cache, rule: Rule | None, replay: Replay
) -> Loads:
    """Run scores through routing and residency and count what each layer asks for.

    Devices own experts by id mod D. The few layers of the scores stand for all: layer l takes the
    counts of layer l mod L' of another token, so that layers are as independent as they are.

    Args:
        scores: float32 [T, L', E].
        cache: slots of one layer.
        rule: decides on experts, given which are on the device or in RAM; None for the exact k.
        replay: see there.

    Raises:
        ConfigError: the device slots of all layers together hold less than one layer's experts.
    """
    n_tokens, n_layers, n_experts = scores.shape
    residency = Residency(_topology(n_layers, n_experts, cache, replay), cache.policy, cache.ram)
    every = (ExpertKey(layer, e) for e in range(n_experts) for layer in range(n_layers))
    residency.fill(every)  # as the engine does before the first token
    kept = n_tokens - replay.warmup
    counts = np.zeros((len(Tier), kept, n_layers, replay.devices), np.int16)
    demoted = np.zeros((kept, n_layers, replay.devices), np.int16)
    exact = np.sort(np.argpartition(scores, -replay.top_k, axis=2)[:, :, -replay.top_k :])
    exact = exact.astype(np.int32)
    substituted = in_ram = 0
    for token in range(n_tokens):
        row = token - replay.warmup
        for layer in range(n_layers):
            tiers, wanted = residency.tier_of(layer), exact[token, layer]
            if rule is not None:
                resident = (tiers != Tier.NVME)[None]
                route = rule.route(scores[token, layer][None], replay.top_k, resident)
                wanted = np.sort(route.ids[0]).astype(np.int32)
                stand_ins = tiers[route.ids[0][route.substituted[0]]]
                substituted += len(stand_ins) if row >= 0 else 0
                in_ram += int((stand_ins == Tier.RAM).sum()) if row >= 0 else 0
            before = residency.counters.demotions.sum()
            residency.native.plan(layer, wanted)
            residency.native.release(layer)
            if row < 0:
                continue
            kinds = tiers[wanted] * replay.devices + wanted % replay.devices
            counts[:, row, layer] = np.bincount(
                kinds, minlength=len(Tier) * replay.devices
            ).reshape(len(Tier), replay.devices)
            moved = residency.counters.demotions.sum() - before
            demoted[row, layer, token % replay.devices] += moved
    total = max(int(counts.sum()), 1)
    device, ram, nvme = (_spread(part, replay.layers) for part in counts)
    return Loads(device=device, ram=ram, nvme=nvme, demoted=_spread(demoted, replay.layers),
                 substituted=substituted / total,
                 substitutes_in_ram=in_ram / max(substituted, 1))  # fmt: skip


def assumed_loads(
    shares: tuple[float, float, float], activations: int, layers: int, tokens: int, seed: int
) -> Loads:
    """Draw loads of one device with given shares of activations by tier, layers independent."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(activations, shares, size=(tokens, layers)).astype(np.int16)
    device, ram, nvme = (drawn[..., i : i + 1] for i in range(len(Tier)))
    return Loads(device=device, ram=ram, nvme=nvme, demoted=np.zeros_like(ram))


def _spread(part: Counts, layers: int) -> Counts:
    """Make [T, L', D] into [T, L, D]: copies of the layers, shifted in time."""
    n_tokens, n_layers, _ = part.shape
    copies = -(-layers // n_layers)
    step = max(1, n_tokens // copies)
    rolled = [np.roll(part, copy * step, axis=0) for copy in range(copies)]
    return np.concatenate(rolled, axis=1)[:, :layers]


def _topology(n_layers: int, n_experts: int, cache: Cache, replay: Replay) -> Topology:
    slots = min(n_experts * n_layers, int(cache.device_slots * n_layers))
    if slots < replay.top_k:
        raise ConfigError(
            f"{cache.device_slots:.1f} device slots per layer over {n_layers} layers hold less "
            f"than one layer's {replay.top_k} experts"
        )
    rest = n_experts * n_layers - (slots if cache.ram == "exclusive" else 0)
    zeros = np.zeros(n_layers, dtype=np.int32)
    return Topology(
        n_layers=n_layers,
        n_experts=n_experts,
        layer_device=zeros,
        layer_class=zeros,
        device_slots={(0, 0): slots},
        ram_slots={(0, 0): min(rest, int(cache.ram_slots * n_layers))},
        device_node=(0,),
    )
