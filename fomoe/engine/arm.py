"""Which of a token's experts in RAM the processor computes there, instead of a GPU after a copy.

Kernels of the two round differently, so nothing that varies may choose: the table is made once,
from costs measured at the start, and goes into receipts. How many experts of a step stay in RAM is
then a function of how many of them lie there, and which ones of their ids.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ArmCosts:
    """Seconds of one expert: its copy over the link, its kernels on the GPU, on the processor."""

    copy_s: float
    gpu_s: float
    cpu_s: float


def arm_table(costs: ArmCosts, top_k: int) -> tuple[int, ...]:
    """Return how many of n experts in RAM the processor computes, for n from 0 to `top_k`.

    The fewest that make the step as short as it can be: the link brings one expert after the other
    and the GPU computes each as it comes, while the processor computes its own.
    """
    return tuple(
        min(range(n + 1), key=lambda m, n=n: (step_s(costs, n - m, m), m))  # type: ignore[misc]
        for n in range(top_k + 1)
    )


def step_s(costs: ArmCosts, copied: int, stay: int) -> float:
    """Return the seconds until `copied` experts are computed on the GPU and `stay` in RAM."""
    slowest = max(costs.copy_s, costs.gpu_s)
    gpu = costs.copy_s + costs.gpu_s + (copied - 1) * slowest if copied else 0.0
    return max(gpu, stay * costs.cpu_s)


def arm_text(table: tuple[int, ...]) -> str:
    """Return the table for a receipt: `off`, or for example `0 0 1 1 2` for n = 0 to 4."""
    return " ".join(map(str, table)) if any(table) else "off"
