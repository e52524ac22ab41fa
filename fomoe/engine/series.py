"""Running totals of an engine under the names of `telemetry.METRICS`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fomoe.engine.meter import Meter
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
    host, loss = meter.host, meter.loss
    parts = {
        f'{name}{{part="{part}"}}': value
        for name, values in (
            ("fomoe_prompt_part_seconds_total", meter.prompt_parts),
            ("fomoe_token_part_seconds_total", meter.generated_parts),
        )
        for part, value in zip(PARTS, values, strict=True)
    }
    by_cause = causes(
        host.nvme_bytes,
        prompt=host.prompt_bytes,
        prefetch=host.prefetch_bytes,
        background=host.background_bytes,
        shadow=host.shadow_bytes,
    )
    parts |= {
        f'fomoe_expert_cause_bytes_total{{cause="{cause}"}}': float(value)
        for cause, value in by_cause.items()
    }
    parts |= {
        f'fomoe_expert_share{{outcome="{outcome}"}}': share
        for outcome, share in meter.shares().items()
    }
    lookups, prompt = "fomoe_expert_lookups_total", "fomoe_prompt_expert_lookups_total"
    return {
        "fomoe_prompt_tokens_total": float(meter.prompt_tokens),
        "fomoe_prompt_cached_tokens_total": float(meter.cached_tokens),
        "fomoe_prompt_seconds_total": meter.prompt_s,
        "fomoe_generated_tokens_total": float(meter.generated_tokens),
        "fomoe_generated_seconds_total": meter.generated_s,
        "fomoe_tokens_per_second": meter.rate(),
        f'{lookups}{{tier="device"}}': float(host.hits_device),
        f'{lookups}{{tier="ram"}}': float(host.hits_ram),
        f'{lookups}{{tier="nvme"}}': float(host.reads_nvme),
        f'{prompt}{{tier="device"}}': float(host.prompt_hits_device),
        f'{prompt}{{tier="ram"}}': float(host.prompt_hits_ram),
        f'{prompt}{{tier="nvme"}}': float(host.prompt_reads_nvme),
        "fomoe_substitutions_total": float(loss.substituted),
        'fomoe_substitutes_total{tier="device"}': float(host.substitutes_device),
        'fomoe_substitutes_total{tier="ram"}': float(host.substitutes_ram),
        'fomoe_substitutes_total{tier="nvme"}': float(host.substitutes_nvme),
        "fomoe_router_mass_lost_total": loss.lost_mass,
        "fomoe_logical_bytes_total": float(loss.logical_bytes),
        "fomoe_shadow_steps_total": float(loss.shadow_steps),
        "fomoe_shadow_kl_nats_total": loss.shadow_nanonats / NANO,
        "fomoe_estimated_kl": meter.estimated_kl(),
        "fomoe_quality_price": meter.price,
        "fomoe_expert_bytes_read_total": float(host.nvme_bytes),
        "fomoe_expert_bytes_copied_total": float(host.ram_bytes),
        "fomoe_expert_stall_seconds_total": host.stall_s,
        'fomoe_expert_evictions_total{tier="device"}': float(residency.evictions.sum()),
        'fomoe_expert_evictions_total{tier="ram"}': float(residency.ram_drops.sum()),
        "fomoe_expert_demotions_total": float(residency.demotions.sum()),
        "fomoe_expert_demoted_bytes_total": float(host.demoted_bytes),
        "fomoe_prefetch_issued_total": float(host.prefetch_issued),
        "fomoe_prefetch_used_total": float(host.prefetch_used),
        "fomoe_prefetch_wasted_total": float(residency.prefetch_wasted.sum()),
        'fomoe_decode_prefetches_total{outcome="asked"}': float(host.prefetched),
        'fomoe_decode_prefetches_total{outcome="used"}': float(host.prefetched_used),
        'fomoe_decode_prefetches_total{outcome="dropped"}': float(host.prefetched_dropped),
        'fomoe_tier_bytes{tier="device"}': float(tiers.device),
        'fomoe_tier_bytes{tier="ram"}': float(tiers.ram),
        'fomoe_tier_capacity_bytes{tier="device"}': float(tiers.device_slots),
        'fomoe_tier_capacity_bytes{tier="ram"}': float(tiers.ram_slots),
    } | parts
