"""How much of a GPU node's memory experts pass through on their way to VRAM; pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fomoe.errors import BudgetError
from fomoe.residency import ExpertSizes

Pools = dict[tuple[int, int], int]  # slots by (node, size class)

# For each device: a token's reads and the demotions that make room for them, and as much again for
# what is brought ahead of the next layers' tokens.
TOKENS_STAGED = 4
LEAST_STAGED = 2  # one expert's read and the demotion for it: steps go on, one expert at a time
MOST_SHARE = 2  # of a RAM budget, staging takes at most one part in so many
FREE_BYTES = 256 << 20  # where the devices hold every expert, and no RAM tier is needed


def plan_staging(sizes: ExpertSizes, top_k: int, ram_bytes: Sequence[int]) -> Pools:
    """Return staging slots by (node, class), out of each node's `ram_bytes`.

    Raises:
        BudgetError: a node's bytes do not hold the least; names what does.
    """
    staging: Pools = {}
    for node, given in enumerate(ram_bytes):
        wanted = _wanted(sizes, top_k, node)
        least = sum(LEAST_STAGED * sizes.slot_bytes[c] for c in wanted)
        if least > given:
            raise BudgetError(f"node {node}: RAM that experts pass through to VRAM", least, given)
        more = {c: max(0, n - LEAST_STAGED) for c, n in wanted.items()}
        whole = sum(n * sizes.slot_bytes[c] for c, n in more.items())
        share = min(whole, max(0, given // MOST_SHARE - least))
        for c, n in more.items():
            staging[node, c] = LEAST_STAGED + n * share // max(whole, 1)
    return staging


def staging_bytes(sizes: ExpertSizes, staging: Pools, node: int | None = None) -> int:
    """Return the bytes of the staging slots of a node, of all when None."""
    return sum(n * sizes.slot_bytes[c] for (at, c), n in staging.items() if node in (None, at))


def _wanted(sizes: ExpertSizes, top_k: int, node: int) -> dict[int, int]:
    """Return the slots of each class that keep the node's devices busy; no more than experts."""
    slots: dict[int, int] = {}
    for device in (d for d, n in enumerate(sizes.device_node) if n == node):
        served = sizes.layer_class[sizes.layer_device == device]
        for c, layers in zip(*np.unique(served, return_counts=True), strict=True):
            here = min(TOKENS_STAGED * top_k, int(layers) * sizes.n_experts)
            slots[int(c)] = slots.get(int(c), 0) + here
    return slots
