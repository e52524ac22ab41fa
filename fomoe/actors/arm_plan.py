"""Whether storage is to have an arm beside GPUs, and what it needs for one."""

from __future__ import annotations

from fomoe.actors.layers import neighbours
from fomoe.actors.processor_arm import ArmPlace, ArmPlan
from fomoe.config import EngineConfig
from fomoe.engine.plan import EnginePlan
from fomoe.model.spec import ModelSpec


def has_arm(config: EngineConfig, plan: EnginePlan) -> bool:
    """Return whether experts of a token may be computed in RAM: not where none lies there."""
    return config.cpu_arm != "off" and sum(plan.topology.ram_slots.values()) > 0


def arm_plan(config: EngineConfig, spec: ModelSpec, cores: int) -> ArmPlan:
    """Return what storage computes with; the driver and each device keep a core of `cores`."""
    places = [
        ArmPlace(each.name, each.arena, *map(each.layout.start, ("input", "sum", "sum_word")))
        for each in neighbours(config, spec)
    ]
    return ArmPlan(
        tuple(places), spec.hidden, spec.moe.expert_width, spec.moe.top_k,
        int8=config.activations == "int8",
        threads=config.threads or max(1, cores - 1 - len(places)),
    )  # fmt: skip
