"""Which of a token's experts in RAM the processor computes there, instead of a GPU after a copy.

Kernels of the two round differently, so nothing that varies may choose: the table is made once,
from costs measured at the start, and goes into receipts. How many experts of a step stay in RAM is
then a function of how many of them lie there, and which ones of their ids; never while a step comes
in parts.

So a text depends, by rounding, on where experts lie. That in turn depends on what an engine has
been asked before and on nothing else: beside an arm nothing is brought ahead, a step is planned
when every device has answered for the one before, and a prompt's waves are taken note of in turn.
Passes of several tokens, which prompts go through in, do not use the arm.
"""

from __future__ import annotations

from dataclasses import dataclass

from fomoe.errors import ConfigError


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


def fixed_table(cpu_arm: str, top_k: int) -> tuple[int, ...] | None:
    """Return the table that an option gives, nothing but zeros for `off`; None for `auto`.

    Raises:
        ConfigError: the table is one of another model.
    """
    if cpu_arm == "auto":
        return None
    if cpu_arm == "off":
        return (0,) * (top_k + 1)
    table = tuple(map(int, cpu_arm.split()))
    if len(table) != top_k + 1:
        raise ConfigError(
            f"cpu_arm {cpu_arm!r} is for {len(table) - 1} experts a token, this model has {top_k}: "
            f"give {top_k + 1} numbers, for 0 to {top_k} experts in RAM"
        )
    return table
