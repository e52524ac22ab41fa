"""What each layer of each token asks of the tiers: the product's own rules over router scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError
from fomoe.residency import LFRU, Residency
from fomoe.residency.policy import EvictionPolicy
from fomoe.residency.topology import RamPolicy, Topology
from fomoe.routing import Route
from fomoe.traces import SyntheticRouter
from fomoe.types import ExpertKey, Tier

Counts = npt.NDArray[np.int16]

_SHARPNESS = 1.2  # gives cache-aware routing at 0.35 the 6 % of reads that FOMOE published
_UNNAMED = -40.0  # a score below any that a trace names


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
    """Return the scores of a `SyntheticRouter`, float32 [T, L, E], sharp enough for replays."""
    router = SyntheticRouter(n_layers, n_experts, seed, np.float32)
    scores = np.empty((n_tokens, n_layers, n_experts), np.float32)
    for row in scores:
        row[:] = router.scores()
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
    scores: npt.NDArray[np.float32], cache: Cache, rule: Rule, replay: Replay
) -> Loads:
    """Run scores through routing and residency and count what each layer asks for.

    See `replay_ids`; which experts are on the device or in RAM is what the rule is given.

    Args:
        scores: float32 [T, L', E].
        cache: slots of one layer.
        rule: decides on experts.
        replay: see there.
    """
    n_tokens, n_layers, n_experts = scores.shape
    tiers = _Tiers(cache, replay, (n_tokens, n_layers, n_experts))
    substituted = in_ram = 0
    for token in range(n_tokens):
        for layer in range(n_layers):
            at = tiers.residency.tier_of(layer)
            resident = (at != Tier.NVME)[None]
            route = rule.route(scores[token, layer][None], replay.top_k, resident)
            tiers.want(token, layer, at, np.sort(route.ids[0]).astype(np.int32))
            if token >= replay.warmup:
                stand_ins = at[route.ids[0][route.substituted[0]]]
                substituted += len(stand_ins)
                in_ram += int((stand_ins == Tier.RAM).sum())
    return tiers.loads(substituted, in_ram)


def scores_of_rows(
    ids: npt.NDArray[np.integer[Any]], probabilities: npt.NDArray[np.floating[Any]], n_experts: int
) -> npt.NDArray[np.float32]:
    """Return scores float32 [T, L, E] of a recorded trace's rows [T, L, C], best first.

    A score is the logarithm of the probability; experts that a row does not name are far below.
    Ties, which half precision makes, keep the row's order.
    """
    n_tokens, n_layers, count = ids.shape
    scores = np.full((n_tokens, n_layers, n_experts), _UNNAMED, np.float32)
    logs = np.log(np.maximum(probabilities.astype(np.float32), np.float32(1e-12)))
    logs -= np.float32(1e-5) * np.arange(count, dtype=np.float32)
    np.put_along_axis(scores, ids.astype(np.int64), logs, axis=2)
    return scores


def exact_ids(scores: npt.NDArray[np.float32], top_k: int) -> npt.NDArray[np.int32]:
    """Return the best k experts of each row, int32 [T, L', k], ascending by id."""
    best = np.argpartition(scores, -top_k, axis=2)[:, :, -top_k:]
    return np.sort(best).astype(np.int32)


def replay_ids(ids: npt.NDArray[np.int32], n_experts: int, cache: Cache, replay: Replay) -> Loads:
    """Run wanted experts through a residency and count what each layer asks for.

    Devices own experts by id mod D. If there are fewer layers than the model has, they stand for
    all: layer l takes the counts of layer l mod L' of another token, so that layers stay as
    independent as they are.

    Args:
        ids: int32 [T, L', k], ascending and distinct in a row.
        n_experts: of a layer.
        cache: slots of one layer.
        replay: see there.

    Raises:
        ConfigError: the device slots of all layers together hold less than one layer's experts.
    """
    n_tokens, n_layers, _ = ids.shape
    tiers = _Tiers(cache, replay, (n_tokens, n_layers, n_experts))
    for token in range(n_tokens):
        for layer in range(n_layers):
            tiers.want(token, layer, tiers.residency.tier_of(layer), ids[token, layer])
    return tiers.loads()


class _Tiers:
    """A residency under replay, and what was wanted of its tiers."""

    def __init__(self, cache: Cache, replay: Replay, shape: tuple[int, int, int]) -> None:
        n_tokens, n_layers, n_experts = shape
        self.residency = open_residency(cache, (n_layers, n_experts, replay.top_k))
        self._replay = replay
        kept = n_tokens - replay.warmup
        self._counts = np.zeros((len(Tier), kept, n_layers, replay.devices), np.int16)
        self._demoted = np.zeros((kept, n_layers, replay.devices), np.int16)

    def want(
        self, token: int, layer: int, tiers: npt.NDArray[np.int8], wanted: npt.NDArray[np.int32]
    ) -> None:
        """Bring what a layer wants and count where it was."""
        residency, devices = self.residency, self._replay.devices
        before = residency.counters.demotions.sum()
        residency.native.plan(layer, wanted)
        residency.native.release(layer)
        row = token - self._replay.warmup
        if row < 0:
            return
        kinds = tiers[wanted] * devices + wanted % devices
        found = np.bincount(kinds, minlength=len(Tier) * devices)
        self._counts[:, row, layer] = found.reshape(len(Tier), devices)
        moved = residency.counters.demotions.sum() - before
        self._demoted[row, layer, token % devices] += moved

    def loads(self, substituted: int = 0, in_ram: int = 0) -> Loads:
        """Return what was counted."""
        layers, total = self._replay.layers, max(int(self._counts.sum()), 1)
        device, ram, nvme = (spread_layers(part, layers) for part in self._counts)
        return Loads(
            device=device, ram=ram, nvme=nvme, demoted=spread_layers(self._demoted, layers),
            substituted=substituted / total, substitutes_in_ram=in_ram / max(substituted, 1),
        )  # fmt: skip


def assumed_loads(
    shares: tuple[float, float, float], activations: int, layers: int, tokens: int, seed: int
) -> Loads:
    """Draw loads of one device with given shares of activations by tier, layers independent."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(activations, shares, size=(tokens, layers)).astype(np.int16)
    device, ram, nvme = (drawn[..., i : i + 1] for i in range(len(Tier)))
    return Loads(device=device, ram=ram, nvme=nvme, demoted=np.zeros_like(ram))


def spread_layers(part: Counts, layers: int) -> Counts:
    """Make counts int16 [T, L', D] into [T, L, D]: copies of the layers, shifted in time."""
    n_tokens, n_layers, _ = part.shape
    copies = -(-layers // n_layers)
    step = max(1, n_tokens // copies)
    rolled = [np.roll(part, copy * step, axis=0) for copy in range(copies)]
    return np.concatenate(rolled, axis=1)[:, :layers]


def open_residency(cache: Cache, shape: tuple[int, int, int]) -> Residency:
    """Return the residency of one device, its slots full as before the engine's first token.

    Args:
        cache: slots of one layer.
        shape: layers, experts of a layer, experts per token.

    Raises:
        ConfigError: the device slots of all layers together hold less than one layer's experts.
    """
    n_layers, n_experts, top_k = shape
    slots = min(n_experts * n_layers, int(cache.device_slots * n_layers))
    if slots < top_k:
        raise ConfigError(
            f"{cache.device_slots:.1f} device slots per layer over {n_layers} layers hold less "
            f"than one layer's {top_k} experts"
        )
    rest = n_experts * n_layers - (slots if cache.ram == "exclusive" else 0)
    zeros = np.zeros(n_layers, dtype=np.int32)
    topology = Topology(
        n_layers=n_layers,
        n_experts=n_experts,
        layer_device=zeros,
        layer_class=zeros,
        device_slots={(0, 0): slots},
        ram_slots={(0, 0): min(rest, int(cache.ram_slots * n_layers))},
        device_node=(0,),
    )
    residency = Residency(topology, cache.policy, cache.ram)
    residency.fill(ExpertKey(layer, e) for e in range(n_experts) for layer in range(n_layers))
    return residency
