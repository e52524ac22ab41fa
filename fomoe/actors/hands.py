"""What the driver does its work with: a layer loop, and what fills the tiers behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from fomoe.actors.channel import Fabric
from fomoe.actors.dispatch import TieredExperts
from fomoe.actors.driver_dense import DriverDense, OwnDevices
from fomoe.actors.layer_arm import LayerArm
from fomoe.actors.layer_calls import LayerCalls
from fomoe.actors.layer_dense import Dense, HostedDense
from fomoe.actors.layer_fill import ExpertLoader
from fomoe.actors.layer_host import DeviceLayers
from fomoe.actors.layer_layout import LayerArena
from fomoe.actors.layer_link import LayerLink
from fomoe.actors.layer_traffic import LayerTraffic
from fomoe.actors.layout import StepArena
from fomoe.actors.messages import Priority
from fomoe.actors.names import ARM_NODE, arena_name, device_name, storage_name
from fomoe.actors.step import DeviceLink, Links, NodeLink, StepBuffer
from fomoe.config import EngineConfig
from fomoe.engine.ahead import AheadArrays, Governor
from fomoe.engine.device_forward import DeviceForward
from fomoe.engine.fill import PROFILE_TOKENS, Frequencies, fill_order
from fomoe.engine.forward import Forward
from fomoe.engine.hosting import host_options, looks_ahead, n_states
from fomoe.engine.loop import LayerLoop
from fomoe.engine.meter import HostCounters
from fomoe.engine.placed import Placed
from fomoe.engine.plan import EnginePlan
from fomoe.engine.transfers import SegmentSlots
from fomoe.engine.waterfall import Stopwatch
from fomoe.engine.waves import Priorities
from fomoe.errors import PeerStalledError
from fomoe.model.layers import DenseModel
from fomoe.model.spec import ModelSpec
from fomoe.residency import LFRU, LRU, Placement, Residency

_PRELOAD_STALL_S = 60.0
_PRIORITIES = Priorities(int(Priority.DEMAND), int(Priority.PREFETCH), int(Priority.BACKGROUND))


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """What is run: configuration, model and plan, equal in every process.

    `arm` says how many of 0, 1, 2 .. experts of a token in RAM are computed there; nobody needs to
    know but the driver.
    """

    config: EngineConfig
    spec: ModelSpec
    plan: EnginePlan
    arm: tuple[int, ...] = ()

    def residency(self) -> Residency:
        """Return an empty residency for the plan."""
        policy = LRU() if self.config.eviction == "lru" else LFRU()
        return Residency(self.plan.topology, policy, self.config.ram_policy)


class Hands(Protocol):
    """The driver's hands: experts on CPU devices, or whole layers on GPUs."""

    @property
    def loop(self) -> LayerLoop:
        """What passes go through."""

    @property
    def counters(self) -> HostCounters:
        """Running totals."""

    @property
    def residency(self) -> Residency:
        """Where experts lie."""

    def fill(self, frequencies: Frequencies | None, on_progress: Callable[[float], None]) -> None:
        """Load experts into free slots until they are full; told 0 to 1."""

    def settle(self) -> None:
        """Take what has been reported while nobody waited."""

    def watch(self, checkpoint: Callable[[], None]) -> None:
        """Call this while waiting inside a long pass; what it raises ends the pass."""

    def reach(self, depth: int) -> None:
        """Look so many layers ahead from the next token on."""


class ExpertHands:
    """The dense model in this process, experts on `cpu` devices."""

    def __init__(self, fabric: Fabric, engine: Engine, model: DenseModel) -> None:
        self._fabric = fabric
        self._engine = engine
        self.host = _connect_experts(fabric, engine)
        # Where every expert has a slot there is nothing to read ahead.
        prefetch = engine.config.prefetch and not engine.plan.holds_all
        self.loop = Forward(model, self.host, prefetch=prefetch)

    @property
    def counters(self) -> HostCounters:
        """Running totals."""
        return self.host.counters

    @property
    def residency(self) -> Residency:
        """Where experts lie."""
        return self.host.residency

    def fill(self, frequencies: Frequencies | None, on_progress: Callable[[float], None]) -> None:
        """Load experts into free slots until they are full, before anyone waits for a token."""
        reads = self.host.reads
        placements = _placements(self._engine, self.residency, frequencies)
        wanted, landed = reads.preload(placements), 0
        moved = time.monotonic()
        while landed < wanted:
            bell = self._fabric.bell()
            new = reads.preloaded()
            if new:
                landed, moved = landed + new, time.monotonic()
                on_progress(landed / wanted)
            elif time.monotonic() - moved > _PRELOAD_STALL_S:
                raise PeerStalledError(storage_name(0), _PRELOAD_STALL_S)
            else:
                self._fabric.wait(bell, 0, 100)

    def settle(self) -> None:
        """Take what storage has reported while nobody waited for a step."""
        self.host.reads.settle()

    def watch(self, checkpoint: Callable[[], None]) -> None:
        """Call this while waiting inside a prompt; what it raises ends the pass."""
        self.host.sweeps.checkpoint = checkpoint

    def reach(self, depth: int) -> None:
        """Look so many layers ahead from the next token on."""
        self.host.governor.reach(depth)


class LayerHands:
    """Layers on GPUs; this process decides, and has the dense part of each where `own` is given."""

    def __init__(self, fabric: Fabric, engine: Engine, own: OwnDevices | None) -> None:
        self._fabric = fabric
        self._engine = engine
        config, spec, plan = engine.config, engine.spec, engine.plan
        ahead = AheadArrays(spec.n_layers, spec.moe.n_experts, config.prefetch_budget)
        placed = Placed(plan, engine.residency(), spec.moe.top_k, _PRIORITIES, ahead)
        links = layer_links(fabric, engine)
        nodes = _node_links(fabric, placed.segments)
        governor = Governor(
            ahead, depth=min(1, config.prefetch_depth),
            expert_bytes=int(placed.expert_bytes.mean()),
        )  # fmt: skip
        arm = LayerArm(fabric, nodes[ARM_NODE].sender, placed, engine.arm)
        self._may_look_ahead = looks_ahead(config) and not arm.on
        self._traffic = LayerTraffic(
            fabric, nodes, links, placed, governor, ahead=self._may_look_ahead
        )
        calls = LayerCalls(fabric, links, placed, self._traffic, arm)
        home = [links[d] for d in plan.topology.layer_device]
        dense: Dense = HostedDense(calls, home)
        watch = Stopwatch()
        if own is not None:
            own.share(fabric, links)
            dense = DriverDense(calls, home, own, watch)
        self.host = DeviceLayers(
            calls, links, placed, self._traffic, dense, n_states=n_states(config)
        )
        self.loop = DeviceForward(spec, self.host, watch)

    @property
    def counters(self) -> HostCounters:
        """Running totals."""
        return self.host.counters

    @property
    def residency(self) -> Residency:
        """Where experts lie."""
        return self.host.placed.residency

    def fill(self, frequencies: Frequencies | None, on_progress: Callable[[float], None]) -> None:
        """Load experts into VRAM and RAM until both are full."""
        placed = self.host.placed
        placements = _placements(self._engine, self.residency, frequencies)
        loader = ExpertLoader(self._fabric, self.host.links, placed, self._traffic)
        loader.run(placements, on_progress)

    def settle(self) -> None:
        """Take what storage has reported while nobody waited for a step."""
        self.host.settle()

    def watch(self, checkpoint: Callable[[], None]) -> None:
        """The loop calls it after each layer."""

    def reach(self, depth: int) -> None:
        """Look ahead from the next token on, or (0) not."""
        self._traffic.looks_ahead = depth > 0 and self._may_look_ahead and self._traffic.moves


def _placements(
    engine: Engine, residency: Residency, frequencies: Frequencies | None
) -> list[Placement]:
    """Give slots to experts, the most frequent first; returns them in the order of loading."""
    if frequencies is not None:
        residency.warm(frequencies, PROFILE_TOKENS)
    return residency.fill(fill_order(engine.plan.topology, frequencies))


def _node_links(fabric: Fabric, segments: Sequence[SegmentSlots]) -> list[NodeLink]:
    """Return the driver's ends of the nodes' storage, each with the accounts of its segment."""
    return [
        NodeLink(name, fabric.sender(name), fabric.receiver(name), segment)
        for name, segment in zip(map(storage_name, count()), segments, strict=False)
    ]


def _connect_experts(fabric: Fabric, engine: Engine) -> TieredExperts:
    config, spec, plan = engine.config, engine.spec, engine.plan
    topology = plan.topology
    layout = StepArena(config.prefill_chunk, spec.hidden, spec.moe.top_k, spec.moe.n_experts)
    devices = []
    for i, node in enumerate(topology.device_node):
        name, arena = device_name(i), arena_name(i)
        views = layout.views(fabric.arena(arena))
        buffers = tuple(StepBuffer(arena, n, view) for n, view in enumerate(views))
        shares_cores = node == 0 and config.devices[i].startswith("cpu")
        devices.append(DeviceLink(name, node, shares_cores, fabric.sender(name),
                                  fabric.receiver(name), buffers))  # fmt: skip
    segments = [plan.segment_slots(i) for i in range(max(topology.device_node) + 1)]
    nodes = _node_links(fabric, segments)
    sizes = [plan.table.expert_bytes(i) for i in range(spec.n_layers)]
    governor = Governor(
        AheadArrays(spec.n_layers, spec.moe.n_experts, config.prefetch_budget),
        depth=config.prefetch_depth,
        expert_bytes=sum(sizes) // len(sizes),
    )
    return TieredExperts(
        fabric, Links(devices, nodes), topology, engine.residency(), sizes, layout, governor
    )


def layer_links(fabric: Fabric, engine: Engine) -> list[LayerLink]:
    """Return the driver's ends of the devices that host layers."""
    links = []
    for i, options in enumerate(host_options(engine.config, engine.spec)):
        name, arena = device_name(i), arena_name(i)
        layout = LayerArena(engine.spec, options)
        node, views = engine.plan.topology.device_node[i], layout.views(fabric.arena(arena))
        ports = fabric.sender(name), fabric.receiver(name)
        links.append(LayerLink(name, i, node, arena, layout, views, *ports))
    return links
