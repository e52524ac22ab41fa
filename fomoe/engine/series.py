"""Running totals of an engine under the names of `telemetry.METRICS`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fomoe.engine.meter import HostCounters, Meter
from fomoe.engine.plan import EnginePlan
from fomoe.engine.requests import causes
from fomoe.engine.waterfall import PARTS
from fomoe.residency import Counters, Residency
from fomoe.routing.price import NANO
from fomoe.types import Tier


@dataclass(frozen=True, slots=True)
class TierBytes:
    """Bytes of experts in each tier and bytes of its slots, over all devices and nodes."""

    device: int
    ram: int
    device_slots: int
    ram_slots: int


def tier_bytes(plan: EnginePlan, residency: Residency) -> TierBytes:
    """Return what the tiers hold now."""
    sizes = np.array([plan.table.expert_bytes(i) for i in range(plan.topology.n_layers)])
    device, ram = (
        int((np.count_nonzero(residency.slots(tier) >= 0, axis=1) * sizes).sum())
        for tier in (Tier.DEVICE, Tier.RAM)
    )
    return TierBytes(device, ram, *plan.slot_bytes())


def engine_series(meter: Meter, residency: Counters, tiers: TierBytes) -> dict[str, float]:
    """Return value by series, labels written into the name as Prometheus does."""
    host = meter.host
    return {
        "fomoe_prompt_tokens_total": float(meter.prompt_tokens),
        "fomoe_prompt_cached_tokens_total": float(meter.cached_tokens),
        "fomoe_prompt_seconds_total": meter.prompt_s,
        "fomoe_generated_tokens_total": float(meter.generated_tokens),
        "fomoe_generated_seconds_total": meter.generated_s,
        "fomoe_tokens_per_second": meter.rate(),
        "fomoe_expert_bytes_read_total": float(host.nvme_bytes),
        "fomoe_expert_bytes_copied_total": float(host.ram_bytes),
        "fomoe_experts_computed_in_ram_total": float(host.computed_in_ram),
        "fomoe_expert_stall_seconds_total": host.stall_s,
        'fomoe_expert_evictions_total{tier="device"}': float(residency.evictions.sum()),
        'fomoe_expert_evictions_total{tier="ram"}': float(residency.ram_drops.sum()),
        "fomoe_expert_demotions_total": float(residency.demotions.sum()),
        "fomoe_expert_demoted_bytes_total": float(host.demoted_bytes),
        "fomoe_prefetch_issued_total": float(host.prefetch_issued),
        "fomoe_prefetch_used_total": float(residency.prefetch_used.sum()),
        "fomoe_prefetch_wasted_total": float(residency.prefetch_wasted.sum()),
        'fomoe_tier_bytes{tier="device"}': float(tiers.device),
        'fomoe_tier_bytes{tier="ram"}': float(tiers.ram),
        'fomoe_tier_capacity_bytes{tier="device"}': float(tiers.device_slots),
        'fomoe_tier_capacity_bytes{tier="ram"}': float(tiers.ram_slots),
        **_contract_series(meter),
        **_labelled(host),
        **_of_parts(meter),
    }


def _contract_series(meter: Meter) -> dict[str, float]:
    """Return what contracts did and what they cost."""
    loss = meter.loss
    return {
        "fomoe_substitutions_total": float(loss.substituted),
        "fomoe_router_mass_lost_total": loss.lost_mass,
        "fomoe_logical_bytes_total": float(loss.logical_bytes),
        "fomoe_shadow_steps_total": float(loss.shadow_steps),
        "fomoe_shadow_kl_nats_total": loss.shadow_nanonats / NANO,
        "fomoe_estimated_kl": meter.estimated_kl(),
        "fomoe_quality_price": meter.price,
    }


def _labelled(host: HostCounters) -> dict[str, float]:
    """Return what is told apart by tier, by outcome and by cause."""
    by_cause = causes(
        host.nvme_bytes,
        prompt=host.prompt_bytes,
        prefetch=host.prefetch_bytes,
        background=host.background_bytes,
        shadow=host.shadow_bytes,
    )
    tables: dict[str, tuple[str, dict[str, int]]] = {
        "fomoe_expert_lookups_total": (
            "tier", {"device": host.hits_device, "ram": host.hits_ram, "nvme": host.reads_nvme},
        ),
        "fomoe_prompt_expert_lookups_total": (
            "tier", {"device": host.prompt_hits_device, "ram": host.prompt_hits_ram,
                     "nvme": host.prompt_reads_nvme},
        ),
        "fomoe_substitutes_total": (
            "tier", {"device": host.substitutes_device, "ram": host.substitutes_ram,
                     "nvme": host.substitutes_nvme},
        ),
        "fomoe_decode_prefetches_total": (
            "outcome", {"asked": host.prefetched, "used": host.prefetched_used,
                        "dropped": host.prefetched_dropped},
        ),
        "fomoe_expert_cause_bytes_total": ("cause", by_cause),
    }  # fmt: skip
    return {
        f'{name}{{{label}="{value}"}}': float(count)
        for name, (label, counts) in tables.items()
        for value, count in counts.items()
    }


def _of_parts(meter: Meter) -> dict[str, float]:
    """Return where time went, and the outcomes of the present request's activations."""
    tables = (
        ("fomoe_prompt_part_seconds_total", meter.prompt_parts),
        ("fomoe_token_part_seconds_total", meter.generated_parts),
    )
    parts = {
        f'{name}{{part="{part}"}}': seconds
        for name, values in tables
        for part, seconds in zip(PARTS, values, strict=True)
    }
    shares = meter.shares().items()
    return parts | {
        f'fomoe_expert_share{{outcome="{outcome}"}}': share for outcome, share in shares
    }
