"""Memory budgets to slot counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import BudgetError, ConfigError
from fomoe.residency.slots import Pool
from fomoe.residency.topology import RamPolicy, Topology


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertSizes:
    """The plain numbers of a model and its placement.

    `slot_bytes[c]` is a slot of size class c; `layer_class` and `layer_device` are int32 [L];
    `device_node[d]` is the node of device d.
    """

    n_experts: int
    slot_bytes: tuple[int, ...]
    layer_class: npt.NDArray[np.int32]
    layer_device: npt.NDArray[np.int32]
    device_node: tuple[int, ...]


def plan_budgets(
    sizes: ExpertSizes,
    *,
    vram_budget_bytes: Sequence[int],
    ram_budget_bytes: Sequence[int],
    top_k: int,
    ram: RamPolicy = "exclusive",
) -> Topology:
    """Turn bytes into slots.

    A memory's bytes go to its size classes in proportion to slot_bytes times experts, so each
    class holds the same share of its experts. No pool has more slots than experts; with an
    exclusive RAM tier, no more than the devices leave over.

    Args:
        sizes: expert sizes and placement.
        vram_budget_bytes: for expert slots, by device.
        ram_budget_bytes: for expert slots, by node; 0 means no RAM tier.
        top_k: experts per token; a device holds at least that many of each class it serves.
        ram: whether RAM repeats what a device holds.

    Raises:
        BudgetError: a device's budget is too small; names the least that works.
        ConfigError: budgets do not match devices or nodes, or top_k exceeds the experts.
    """
    _check(sizes, vram_budget_bytes, ram_budget_bytes, top_k)
    device_slots: dict[Pool, int] = {}
    in_ram: dict[int, dict[int, int]] = {node: {} for node in range(len(ram_budget_bytes))}
    for device, budget in enumerate(vram_budget_bytes):
        served = sizes.layer_class[sizes.layer_device == device]
        classes, counts = np.unique(served, return_counts=True)
        experts = {int(c): int(n) * sizes.n_experts for c, n in zip(classes, counts, strict=True)}
        least = sum(top_k * sizes.slot_bytes[c] for c in experts)
        if budget < least:
            what = f"device {device}: top-{top_k} slots of {len(experts)} expert size classes"
            raise BudgetError(what, least, budget)
        slots = _split(budget, experts, sizes.slot_bytes, top_k)
        device_slots |= {(device, c): n for c, n in slots.items()}
        rest = in_ram[sizes.device_node[device]]
        for c, n in experts.items():
            rest[c] = rest.get(c, 0) + n - (slots[c] if ram == "exclusive" else 0)
    ram_slots = {
        (node, c): n
        for node, experts in in_ram.items()
        for c, n in _split(ram_budget_bytes[node], experts, sizes.slot_bytes, 0).items()
    }
    return Topology(
        n_layers=len(sizes.layer_class),
        n_experts=sizes.n_experts,
        layer_device=sizes.layer_device,
        layer_class=sizes.layer_class,
        device_slots=device_slots,
        ram_slots=ram_slots,
        device_node=sizes.device_node,
    )


def _split(
    budget: int, experts: dict[int, int], slot_bytes: Sequence[int], least: int
) -> dict[int, int]:
    """Slots by class: one share of each class's experts, but at least `least` slots."""
    slots = dict.fromkeys(experts, least)
    shared = dict(experts)
    while shared:
        whole = sum(slot_bytes[c] * n for c, n in shared.items())
        fixed = sum(slot_bytes[c] * slots[c] for c in experts if c not in shared)
        share = {c: min(n, (budget - fixed) * n // max(whole, 1)) for c, n in shared.items()}
        small = [c for c, n in share.items() if n < least]
        if not small:
            slots |= share
            break
        # What these get above their share comes off the others'.
        shared = {c: n for c, n in shared.items() if c not in small}
    left = budget - sum(slot_bytes[c] * n for c, n in slots.items())
    # Rounding down leaves less than one slot per class.
    for c in sorted(experts):
        if slots[c] < experts[c] and slot_bytes[c] <= left:
            slots[c] += 1
            left -= slot_bytes[c]
    return slots


def _check(sizes: ExpertSizes, vram: Sequence[int], ram: Sequence[int], top_k: int) -> None:
    if not 1 <= top_k <= sizes.n_experts:
        raise ConfigError(f"top-{top_k} of {sizes.n_experts} experts: choose 1 to all of them")
    if len(vram) != len(sizes.device_node):
        raise ConfigError(f"{len(vram)} device budgets for {len(sizes.device_node)} devices")
    n_nodes = max(sizes.device_node, default=-1) + 1
    if len(ram) < n_nodes:
        raise ConfigError(f"{len(ram)} RAM budgets for {n_nodes} nodes")
    if min(ram, default=0) < 0:
        raise ConfigError(f"a RAM budget is negative: {min(ram):,} bytes; give 0 for no RAM tier")
