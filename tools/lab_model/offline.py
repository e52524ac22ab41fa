"""Exact caches offline: what LRU, LFRU, mass and the offline optimum miss, on recorded experts.

    python tools/lab_model/offline.py out/wanted-1.npz

Differences are paired and clustered by document; the optimum may look at scored tokens only to
choose what to keep, its cache begins empty like the others', and the prefix is not scored.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from fomoe.evaluation.statistics import estimate_mean, estimate_ratio

from fomoe.engine.decisions import Decider
from fomoe.residency.logical import LogicalCaches, LogicalRules
from fomoe.routing.rules import ExactRouting
from fomoe.sim.belady import belady_misses

POLICIES = {
    "lfru": LogicalRules(capacity=21, eviction="lfru"),
    "lru": LogicalRules(capacity=21, eviction="lru"),
}


def misses(ids: np.ndarray, rules: LogicalRules, prefix: int, n_experts: int) -> np.ndarray:
    """Share of scored activations that a policy misses, by window; ids [S, T, L, k]."""
    rows, length, n_layers, k = ids.shape
    caches = LogicalCaches(rows, n_layers, n_experts, rules)
    decider = Decider(ExactRouting(), caches, k)
    count = np.zeros(rows)
    weights = np.full((rows, k), 1.0 / k, np.float32)
    for t in range(length):
        for layer in range(n_layers):
            event = np.ascontiguousarray(ids[:, t, layer], np.int32)
            read = decider.decide_compact(layer, event, weights).read
            if t >= prefix:
                count += read.sum(1)
    return count / ((length - prefix) * n_layers * k)


def optimum(ids: np.ndarray, capacity: int, prefix: int, n_experts: int) -> np.ndarray:
    """The same for Belady's rule with bypass."""
    scored = np.arange(ids.shape[1]) >= prefix
    shares = [
        belady_misses(window.astype(np.int32), scored, capacity, n_experts)[scored].mean()
        for window in ids
    ]
    return np.array(shares)


def main() -> None:
    """Print misses, gains over LRU, and shares of the gap to the optimum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wanted", type=Path)
    parser.add_argument("--experts", type=int, default=128)
    args = parser.parse_args()
    with np.load(args.wanted) as data:
        ids, documents, prefix = data["wanted"][:, :-1], data["documents"], int(data["prefix"])
    seen = {n: misses(ids, rules, prefix, args.experts) for n, rules in POLICIES.items()}
    best = optimum(ids, POLICIES["lru"].capacity, prefix, args.experts)
    print(f"{len(ids)} windows, optimum {100 * best.mean():.2f} %")
    for name, shares in seen.items():
        gain = estimate_mean(100 * (seen["lru"] - shares), documents)
        part = estimate_ratio(seen["lru"] - shares, seen["lru"] - best, documents)
        print(
            f"{name}: misses {100 * shares.mean():.2f} %, gain {gain.mean:.2f} "
            f"[{gain.low:.2f}, {gain.high:.2f}] points, share of the gap {100 * part.value:.1f} "
            f"[{100 * part.low:.1f}, {100 * part.high:.1f}] %"
        )


if __name__ == "__main__":
    main()
