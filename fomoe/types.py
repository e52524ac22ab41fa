"""The vocabulary that every room shares; imports nothing of ours."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Tier(IntEnum):
    """Where an expert's bytes lie; a smaller number is closer to the kernels."""

    DEVICE = 0
    RAM = 1
    NVME = 2


@dataclass(frozen=True, slots=True, order=True)
class ExpertKey:
    """One routed expert (gate, up and down projections) of one MoE layer."""

    layer: int
    expert: int
