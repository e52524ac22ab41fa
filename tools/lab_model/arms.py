"""The rules under test, and how their constants follow from tuning text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from closed_loop import Arm, Bench, Tally

from fomoe.residency.logical import LogicalRules
from fomoe.routing.rules import CacheAwareRouting, DropRouting, ExactRouting, PriceRouting

CAPACITY = 21  # of 128 experts: 16.4 %, the original's share
LEVELS = (0.04, 0.055, 0.07, 0.10, 0.13, 0.16)  # all reads over activations
BACKFILL = Fraction(28, 60)  # the original's background reads per layer and token
THRESHOLDS = (0.80, 0.70, 0.60, 0.50, 0.42, 0.35, 0.28, 0.22)
PRICES = (0.012, 0.02, 0.032, 0.05, 0.08, 0.13, 0.22, 0.4)
PROBE = 0.12  # price at which one layer alone shows its sensitivity
PROTECTED, KAPPA = 1, 0.5
MOST_SENSITIVE = 4.0


def caches(capacity: int = CAPACITY) -> dict[str, LogicalRules]:
    """Return the kinds of logical cache by name."""
    return {
        "lru": LogicalRules(capacity=capacity, eviction="lru"),
        "lfru": LogicalRules(capacity=capacity, eviction="lfru"),
        "mass": LogicalRules(capacity=capacity, eviction="mass", shift=6),
        "backfill": LogicalRules(capacity=capacity, eviction="lru", backfill=BACKFILL),
    }


class Arms:
    """Makes arms on caches of one capacity."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.kinds = caches(capacity)
        self.exact = Arm("exact", ExactRouting(), self.kinds["lru"])
        self.sensitivities: tuple[float, ...] = ()

    def car(self, threshold: float, cache: str = "lru", *, renormalise: bool = False) -> Arm:
        """Cache-aware routing as the original has it, dampened."""
        name = f"car {threshold:.3f} {cache}" + (" renormalised" if renormalise else "")
        rule = CacheAwareRouting(threshold, renormalise=renormalise)
        return Arm(name, rule, self.kinds[cache])

    def plain_price(self, price: float, kappa: float = 1.0) -> Arm:
        """The price rule as first tried: two ranks protected, LFRU, layers alike."""
        rule = PriceRouting(price, protected=2, kappa=kappa)
        return Arm(f"plain price {price:.3f} kappa {kappa:g}", rule, self.kinds["lfru"])

    def drop(self, weight: float) -> Arm:
        """A missing expert below a weight does not run."""
        rule = DropRouting(weight, protected=1, kappa=1.0)
        return Arm(f"drop {weight:.2f}", rule, self.kinds["lfru"])

    def price(self, price: float) -> Arm:
        """Ours: one rank protected, half of the lost mass given back, by layer, mass eviction."""
        rule = PriceRouting(price, PROTECTED, KAPPA, self.sensitivities)
        return Arm(f"price {price:.4f}", rule, self.kinds["mass"])

    def probe(self, layer: int, n_layers: int) -> Arm:
        """Substitute in one layer only: elsewhere a read costs next to nothing."""
        weights = tuple(1.0 if i == layer else 1e9 for i in range(n_layers))
        rule = PriceRouting(PROBE, PROTECTED, KAPPA, weights)
        return Arm(f"layer {layer}", rule, self.kinds["mass"])


def measure_sensitivities(bench: Bench, arms: Arms, most: int) -> tuple[float, ...]:
    """Return each layer's loss of KL per lost weight, over the layers' median, clipped."""
    probes = [arms.probe(layer, bench.n_layers) for layer in range(bench.n_layers)]
    seen = run_all(bench, arms.exact, probes, most)
    loss = np.array([seen[p.name].kl.mean() / max(seen[p.name].lost.mean(), 1e-9) for p in probes])
    relative = loss / np.median(loss)
    return tuple(float(x) for x in np.clip(relative, 1 / MOST_SENSITIVE, MOST_SENSITIVE))


def run_all(
    bench: Bench, exact: Arm, arms: Sequence[Arm], most: int, say: Callable[[str], None] = print
) -> dict[str, Tally]:
    """Run arms beside the exact one, `most` at a time; each is paired with its own pass's exact."""
    out: dict[str, Tally] = {}
    for start in range(0, len(arms), most):
        part = arms[start : start + most]
        out |= bench.run([exact, *part])
        names = ", ".join(f"{a.name} {100 * out[a.name].reads.mean():.2f} %" for a in part)
        say(f"{names}")
    return out


def at_levels(
    values: Sequence[float], tallies: Sequence[Tally], levels: Sequence[float]
) -> list[float | None]:
    """Return the constants that read each level's share, from a grid on tuning text.

    Between two points of the grid the logarithm of the constant is linear in that of the reads;
    None where the grid does not reach.
    """
    reads = np.maximum([float(t.reads.mean()) for t in tallies], 1e-6)
    order = np.argsort(reads)
    logs, points = np.log(reads[order]), np.log(np.array(values)[order])
    inside = [reads.min() <= level <= reads.max() for level in levels]
    found = np.exp(np.interp(np.log(np.array(levels)), logs, points))
    return [float(x) if ok else None for x, ok in zip(found, inside, strict=True)]
