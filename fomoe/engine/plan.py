"""What a run will hold where: budgets to slots, slots to segments; a pure function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from fomoe.config import Budgets, EngineConfig, RoutingConfig, format_bytes
from fomoe.engine.chunk import auto_chunk
from fomoe.engine.gpu_segment import GpuSegment, VramLayout
from fomoe.engine.staging import FREE_BYTES, LEAST_STAGED, Pools, plan_staging, staging_bytes
from fomoe.engine.transfers import SegmentSlots
from fomoe.errors import BudgetError, ConfigError
from fomoe.gguf.extents import ExpertTable
from fomoe.model.spec import ModelSpec
from fomoe.residency import ExpertSizes, LogicalRules, Topology, plan_budgets

# Of the memory that is free when fomoe starts, the share that experts may take by default; the
# rest is for the page cache, other programs and what the processes need themselves.
DEFAULT_SHARE = 0.8
VRAM_RESERVE_BYTES = 768 << 20  # of a GPU's free memory, by actor: its driver, kernels, others
HOSTED_CHUNK = 2048  # prompt tokens that go through the layers of GPUs together
FALLBACK_CAPACITY = 6  # lossy modes without explicit budgets: a sixth of the experts of a layer


@dataclass(frozen=True, slots=True, eq=False)
class EnginePlan:
    """The layout of one engine; equal inputs give equal plans in every process.

    `staging` counts slots by (node, class) that segments of GPU nodes have beside the RAM tier's.
    """

    topology: Topology
    table: ExpertTable
    vram_bytes: int
    ram_bytes: int
    logical_capacity: int
    staging: Mapping[tuple[int, int], int] = field(default_factory=dict)

    def gpu_segment(self, node: int) -> GpuSegment:
        """Return the empty accounts of a GPU node's segment and of its devices' slots."""
        t = self.topology
        staging = {c: n for (where, c), n in self.staging.items() if where == node}
        slots = {c: n + t.ram_slots.get((node, c), 0) for c, n in staging.items()}
        layers = [self.table.expert_bytes(i) for i in range(t.n_layers)]
        return GpuSegment(
            {c: (n, self.table.classes[c].slot_bytes) for c, n in slots.items()},
            t.layer_class, t.n_experts,
            VramLayout(
                pools={p: n for p, n in t.device_slots.items() if t.device_node[p[0]] == node},
                layer_device=t.layer_device,
                layer_bytes=np.array(layers, np.int64),
                staging=staging,
            ),
        )  # fmt: skip

    def vram_slots(self, device: int) -> tuple[int, ...]:
        """Return a device's slots of each size class."""
        slots = self.topology.device_slots
        return tuple(slots.get((device, c), 0) for c in range(len(self.table.classes)))

    def segment_slots(self, node: int) -> SegmentSlots:
        """Return the empty slot table of a node's segment: device and RAM slots by class."""
        t = self.topology
        counts: dict[int, int] = {}
        for (device, size_class), n in t.device_slots.items():
            if t.device_node[device] == node:
                counts[size_class] = counts.get(size_class, 0) + n
        for (where, size_class), n in t.ram_slots.items():
            if where == node:
                counts[size_class] = counts.get(size_class, 0) + n
        return SegmentSlots(
            {c: (n, self.table.classes[c].slot_bytes) for c, n in counts.items() if n},
            t.layer_class, t.n_experts,
        )  # fmt: skip

    def logical_rules(self, routing: RoutingConfig) -> LogicalRules:
        """Return how each sequence's logical cache behaves."""
        return LogicalRules(
            capacity=self.logical_capacity,
            eviction=routing.logical_eviction,
            backfill=routing.backfill_share,
            warmup=routing.warmup,
        )

    @property
    def on_devices(self) -> bool:
        """Whether every expert has a slot on its device."""
        t = self.topology
        return sum(t.device_slots.values()) >= t.n_layers * t.n_experts

    @property
    def holds_all(self) -> bool:
        """Whether every expert has a slot, so that no request needs the file."""
        t = self.topology
        slots = sum(t.device_slots.values()) + sum(t.ram_slots.values())
        return slots >= t.n_layers * t.n_experts

    def slot_bytes(self) -> tuple[int, int]:
        """Return the bytes of all device slots and of all RAM slots."""
        size = [c.slot_bytes for c in self.table.classes]
        device = sum(n * size[c] for (_, c), n in self.topology.device_slots.items())
        ram = sum(n * size[c] for (_, c), n in self.topology.ram_slots.items())
        return device, ram

    def text(self) -> str:
        """Return one paragraph for people: what the budgets hold."""
        t = self.topology
        experts = t.n_layers * t.n_experts
        on_device, in_ram = sum(t.device_slots.values()), sum(t.ram_slots.values())
        device, ram = self.slot_bytes()
        rest = max(0, experts - on_device - in_ram)
        staged = sum(n * self.table.classes[c].slot_bytes for (_, c), n in self.staging.items())
        total = sum(self.table.expert_bytes(i) * t.n_experts for i in range(t.n_layers))
        lines = [
            f"experts  {experts:,} in {t.n_layers} layers, {format_bytes(total)} on NVMe",
            f"device   {on_device:,} slots ({on_device / experts:.0%}), {format_bytes(device)} on "
            f"{len(t.device_node)} device(s) of {format_bytes(self.vram_bytes)}",
            f"ram      {in_ram:,} slots ({in_ram / experts:.0%}), {format_bytes(ram)} of "
            f"{format_bytes(self.ram_bytes)}",
            f"nvme     {rest:,} experts ({rest / experts:.0%}) are read when wanted",
        ]
        if staged:
            through = f"{sum(self.staging.values()):,} slots, {format_bytes(staged)} of host memory"
            lines.insert(3, f"staging  {through} on the way to the devices")
        return "\n".join(lines)


def make_plan(
    table: ExpertTable, spec: ModelSpec, config: EngineConfig, device_node: tuple[int, ...],
    dense_bytes: tuple[int, ...] = (),
) -> EnginePlan:  # fmt: skip
    """Return the plan for explicit budgets; layer l lives on device l mod n.

    `dense_bytes` are what devices that host layers need of their budget before any expert. Where
    those do not hold every expert, the RAM of their nodes holds what passes through it on the way
    to VRAM as well.

    Raises:
        BudgetError: a budget cannot hold one layer's top-k of each size class.
        ConfigError: a budget is missing; or the logical capacity, the backfill or the loss profile
            does not fit.
    """
    budgets, known = config.budgets, len(config.routing.sensitivities)
    if known not in (0, spec.n_layers):
        raise ConfigError(
            f"the loss profile has {known} layers, the model {spec.n_layers}; measure one for it"
        )
    if budgets.vram_bytes is None or budgets.ram_bytes is None:
        raise ConfigError("budgets must be resolved before a plan is made")
    n = len(device_node)
    sizes = ExpertSizes(
        n_experts=spec.moe.n_experts,
        slot_bytes=tuple(c.slot_bytes for c in table.classes),
        layer_class=np.array([table.size_class(i) for i in range(spec.n_layers)], np.int32),
        layer_device=(np.arange(spec.n_layers) % n).astype(np.int32),
        device_node=device_node,
    )
    n_nodes, top_k = max(device_node) + 1, spec.moe.top_k
    vram = _left_for_experts(budgets.vram_bytes, dense_bytes or (0,) * n)
    ram, staging = [budgets.ram_bytes] * n_nodes, Pools()
    if config.hosts_layers:
        on_devices = plan_budgets(
            sizes, vram_budget_bytes=vram, ram_budget_bytes=[0] * n_nodes, top_k=top_k
        )
        if sum(on_devices.device_slots.values()) == spec.n_layers * spec.moe.n_experts:
            staging = plan_staging(sizes, top_k, [max(FREE_BYTES, _least(sizes))] * n_nodes)
            ram = [0] * n_nodes
        else:
            staging = plan_staging(sizes, top_k, ram)
            ram = [left - staging_bytes(sizes, staging, at) for at, left in enumerate(ram)]
    topology = plan_budgets(
        sizes, vram_budget_bytes=vram, ram_budget_bytes=ram, top_k=top_k, ram=config.ram_policy
    )
    plan = EnginePlan(topology, table, budgets.vram_bytes, budgets.ram_bytes,
                      _logical_capacity(topology, spec, config), staging)  # fmt: skip
    plan.logical_rules(config.routing).check(spec.n_layers, spec.moe.n_experts)
    return plan


def _least(sizes: ExpertSizes) -> int:
    return 2 * LEAST_STAGED * sum(sizes.slot_bytes)


def _left_for_experts(vram_bytes: int, dense_bytes: tuple[int, ...]) -> list[int]:
    for device, dense in enumerate(dense_bytes):
        if dense > vram_bytes:
            what = f"device {device}: dense weights, sequences' state and work memory"
            raise BudgetError(what, dense, vram_bytes)
    return [vram_bytes - dense for dense in dense_bytes]


def _logical_capacity(topology: Topology, spec: ModelSpec, config: EngineConfig) -> int:
    """Return the experts per layer that lossy modes take as resident.

    Fixed by the user: an explicit capacity, else what the given budgets hold. Never by how much
    memory happens to be free, so that the same command gives the same text anywhere.
    """
    least, most = spec.moe.top_k, spec.moe.n_experts
    capacity = config.routing.car_capacity
    if capacity is None:
        slots = sum(topology.device_slots.values()) + sum(topology.ram_slots.values())
        capacity = min(most, max(least, slots // spec.n_layers))
    if not least <= capacity <= most:
        raise ConfigError(
            f"--car-capacity {capacity}: a layer has {most} experts and uses {least} at a time; "
            f"choose {least} to {most}"
        )
    return capacity


def resolve(
    config: EngineConfig, table: ExpertTable, spec: ModelSpec, free_bytes: int,
    free_vram: tuple[int, ...] = (), most_ram: int | None = None,
) -> EngineConfig:  # fmt: skip
    """Return `config` with every budget and the prompt chunk explicit.

    Missing budgets come from measured free memory: `free_bytes` of the node, of which the RAM tier
    takes `most_ram` at most by default; `free_vram` of each device that hosts layers.
    """
    if config.hosts_layers:
        most = int(free_bytes * DEFAULT_SHARE)
        most = most if most_ram is None else min(most, most_ram)
        return _resolve_hosted(config, table, spec, most, free_vram)
    config = _resolve_budgets(config, table, spec, free_bytes)
    if config.prefill_chunk:
        return config
    n_devices = len(config.devices)
    given = n_devices * (config.budgets.vram_bytes or 0) + (config.budgets.ram_bytes or 0)
    return replace(config, prefill_chunk=auto_chunk(spec, config.ctx_size, n_devices, given))


def _resolve_hosted(
    config: EngineConfig, table: ExpertTable, spec: ModelSpec, most_ram: int,
    free_vram: tuple[int, ...],
) -> EngineConfig:  # fmt: skip
    """Budgets of GPUs; their chunk goes by the model alone, for chunks may change their bits."""
    vram, ram, routing = config.budgets.vram_bytes, config.budgets.ram_bytes, config.routing
    whole = sum(table.slot_bytes(i) for i in range(spec.n_layers)) * spec.moe.n_experts
    is_measured = vram is None or ram is None
    if vram is None:
        shares = [
            free // config.devices.count(name) - VRAM_RESERVE_BYTES * (1 + config.splits_layers)
            for name, free in zip(config.devices, free_vram, strict=True)
        ]
        vram = max(0, min(shares))
    if ram is None:
        ram = min(whole + FREE_BYTES, most_ram)
    if is_measured and vram * len(config.devices) < whole and routing.car_capacity is None:
        routing = replace(routing, car_capacity=_fallback_capacity(spec))
    return replace(
        config,
        budgets=Budgets(vram_bytes=vram, ram_bytes=ram),
        prefill_chunk=config.prefill_chunk or min(HOSTED_CHUNK, config.ctx_size),
        routing=routing,
    )


def _fallback_capacity(spec: ModelSpec) -> int:
    return max(spec.moe.top_k, spec.moe.n_experts // FALLBACK_CAPACITY)


def _resolve_budgets(
    config: EngineConfig, table: ExpertTable, spec: ModelSpec, free_bytes: int
) -> EngineConfig:
    budgets, routing = config.budgets, config.routing
    if budgets.vram_bytes is not None and budgets.ram_bytes is not None:
        return config
    vram, ram = default_budgets(table, spec, len(config.devices), free_bytes)
    if routing.car_capacity is None:
        routing = replace(routing, car_capacity=_fallback_capacity(spec))
    given = Budgets(
        vram_bytes=vram if budgets.vram_bytes is None else budgets.vram_bytes,
        ram_bytes=ram if budgets.ram_bytes is None else budgets.ram_bytes,
    )
    return replace(config, budgets=given, routing=routing)


def default_budgets(
    table: ExpertTable, spec: ModelSpec, n_devices: int, free_bytes: int
) -> tuple[int, int]:
    """Return (bytes per device, bytes of RAM tier) for `cpu` devices out of free memory.

    Both tiers of a `cpu` device are the same memory, so the device tier takes all of it.
    """
    n = max(n_devices, 1)
    most = 0
    for device in range(n):
        layers = range(device, spec.n_layers, n)
        most = max(most, sum(table.slot_bytes(i) * spec.moe.n_experts for i in layers))
    return min(most, int(free_bytes * DEFAULT_SHARE) // n), 0
