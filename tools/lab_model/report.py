"""Tables, bounds and the Pareto plot from the tallies of one or more seeds.

python tools/lab_model/report.py out/ --plot docs/images/lab-pareto
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from fomoe.evaluation.pareto import Measured, ParetoPoint, ReadBytes, to_json
from fomoe.evaluation.plot import save_pareto
from fomoe.evaluation.statistics import (
    cluster_sums,
    estimate_mean,
    estimate_ratio,
    worst_ratio,
)

BAR = 0.35
SAME_MODEL = 1e-3  # nats between exact passes of one model: prefixes run in half precision
FIELDS = ("nll", "kl", "top1", "demand", "background", "substituted", "dropped", "lost")


class Seed:
    """One seed's tallies by arm: arrays over windows, from runs of parts of the arms."""

    def __init__(self, folders: list[Path], seed: int) -> None:
        self.arms: dict[str, dict[str, np.ndarray]] = {}
        self.facts: dict[str, Any] = {}
        self.seed = seed
        for folder in folders:
            if (folder / f"tallies-{seed}.npz").exists():
                self._add(folder)

    def _add(self, folder: Path) -> None:
        with np.load(folder / f"tallies-{self.seed}.npz") as data:
            self.documents, self.domains = data["documents"], data["domains"]
            found: dict[str, dict[str, np.ndarray]] = {}
            for key in data.files:
                if "|" in key:
                    arm, field = key.split("|")
                    found.setdefault(arm, {})[field] = data[key].astype(np.float64)
        exact = found["exact"]["nll"]
        base = self.arms["exact"]["nll"] if self.arms else exact
        if abs(exact.mean() - base.mean()) > SAME_MODEL:
            raise ValueError(f"{folder} is of another model: its exact run differs")
        for arm in found.values():  # each run's own exact pass takes that pass's noise off
            arm["nll"] += base - exact
        self.arms = found | self.arms
        self.facts = json.loads((folder / f"lab-{self.seed}.json").read_text()) | self.facts

    def excess(self, arm: str) -> np.ndarray:
        """NLL beyond exact routing's by window."""
        return self.arms[arm]["nll"] - self.arms["exact"]["nll"]

    def reads(self, arm: str) -> float:
        """All reads over activations."""
        return float((self.arms[arm]["demand"] + self.arms[arm]["background"]).mean())

    def name_of(self, rule: str, level: int) -> str | None:
        """The arm that stands for a rule at a level; None where tuning found none."""
        value = self.facts["constants"][rule][level]
        if value is None:
            return None
        patterns = {"car": "car {:.3f} lru", "car lfru": "car {:.3f} lfru", "price": "price {:.4f}"}
        name = patterns[rule].format(value)
        return name if name in self.arms else None


def arm_table(seed: Seed) -> list[str]:
    """One line per arm: what it read, replaced and lost."""
    lines = [
        "| arm | demand % | background % | substituted % | lost weight | excess NLL, 1e-4 | "
        "95 % | KL, 1e-4 | top-1 % | PPL |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, a in seed.arms.items():
        e = estimate_mean(seed.excess(name), seed.documents)
        lines.append(
            f"| {name} | {100 * a['demand'].mean():.2f} | {100 * a['background'].mean():.2f} | "
            f"{100 * (a['substituted'] + a['dropped']).mean():.2f} | {a['lost'].mean():.4f} | "
            f"{1e4 * e.mean:.1f} ± {1e4 * e.standard_error:.1f} | "
            f"{1e4 * e.low:.1f} to {1e4 * e.high:.1f} | {1e4 * a['kl'].mean():.1f} | "
            f"{100 * a['top1'].mean():.2f} | {np.exp(a['nll'].mean()):.3f} |"
        )
    return lines


def level_table(seed: Seed, baseline: str) -> list[str]:
    """One line per level: our excess over the baseline's, over all text and the worst domain."""
    steps = seed.facts["scored_steps"]
    lines = [
        f"| level % | {baseline} reads % | ours % | {baseline} excess, 1e-4 | ours | ratio | upper "
        "95 % | worst domain | its ratio | upper 95 % | judged | within |",
        "| " + " --- |" * 12,
    ]
    for i, level in enumerate(seed.facts["levels"]):
        theirs, ours = seed.name_of(baseline, i), seed.name_of("price", i)
        if theirs is None or ours is None:
            lines.append(f"| {100 * level:.1f} | out of the grid's reach |" + " |" * 10)
            continue
        a, b = seed.excess(ours), seed.excess(theirs)
        r = estimate_ratio(a, b, seed.documents)
        pair = np.column_stack([a, b])
        split = {d: seed.domains == d for d in np.unique(seed.domains)}
        w = worst_ratio({d: cluster_sums(pair[m], seed.documents[m]) for d, m in split.items()})
        fair = seed.reads(ours) <= seed.reads(theirs)
        lines.append(
            f"| {100 * level:.1f} | {100 * seed.reads(theirs):.2f} | {100 * seed.reads(ours):.2f} |"
            f" {1e4 * r.baseline:.1f} ({r.sigmas:.0f} s.e.) | {1e4 * r.ours:.1f} | {r.value:.3f} | "
            f"{r.upper:.3f} | {w.domain} | {w.value:.3f} | {w.upper:.3f} | "
            f"{'yes' if r.is_judged else 'no'} | "
            f"{'yes' if w.upper <= BAR and fair else 'no'} |"
        )
    lines.append("")
    lines.append(f"{len(seed.documents) * steps:,} scored tokens, seed {seed.seed}.")
    return lines


def points(seed: Seed, expert_bytes: float) -> list[ParetoPoint]:
    """Return the plot's points; `expert_bytes` are those of one read at the reference mixture."""
    activations = seed.facts["activations"]
    found = []
    families = [("car", "car", "CAR, LRU"), ("car lfru", "car", "CAR, LFRU"),
                ("price", "price", "price")]  # fmt: skip
    for rule, _, series in families:
        for i in range(len(seed.facts["levels"])):
            name = seed.name_of(rule, i)
            if name is not None:
                found.append(_point(seed, name, series, expert_bytes * activations))
    found += [
        _point(seed, name, "exact", expert_bytes * activations)
        for name in ("exact lru", "exact lfru", "exact mass")
    ]
    for mixture, row in seed.facts.get("quants", {}).items():
        scale = expert_bytes * activations * row["bits"] / row["reference_bits"]
        found.append(_point(seed, f"{mixture} lru", "smaller quant, exact, LRU", scale))
        found.append(_point(seed, f"{mixture} mass", "smaller quant, exact, mass", scale))
    return found


def _point(seed: Seed, name: str, series: str, per_token: float) -> ParetoPoint:
    a, e = seed.arms[name], estimate_mean(seed.excess(name), seed.documents)
    kl = estimate_mean(a["kl"], seed.documents)
    return ParetoPoint(
        name=name,
        series=series,
        read=ReadBytes(
            demand=float(a["demand"].mean()) * per_token,
            background=float(a["background"].mean()) * per_token,
        ),
        excess=Measured(mean=e.mean, low=min(e.low, e.mean), high=max(e.high, e.mean)),
        kl=Measured(mean=kl.mean, low=min(kl.low, kl.mean), high=max(kl.high, kl.mean)),
        top1=float(a["top1"].mean()),
        documents=e.documents,
        tokens=e.tokens * seed.facts["scored_steps"],
    )


def main() -> None:
    """Print the tables; write the points and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    numbers = {int(p.stem.split("-")[1]) for f in args.folders for p in f.glob("tallies-*.npz")}
    seeds = [Seed(args.folders, number) for number in sorted(numbers)]
    for seed in seeds:
        print(f"\n## Seed {seed.seed}\n")
        print("\n".join(arm_table(seed)))
        for baseline in ("car", "car lfru"):
            print(f"\n### Against {baseline}\n")
            print("\n".join(level_table(seed, baseline)))
        facts = {k: v for k, v in seed.facts.items() if k.startswith(("contract", "quants"))}
        print("\n```\n" + json.dumps(facts, indent=1) + "\n```")
        if args.plot is not None and "quants" in seed.facts:
            bits = next(iter(seed.facts["quants"].values()))["reference_bits"]
            every = points(seed, bits / 8 * seed.facts["expert_parameters"])
            path = args.plot.with_name(f"{args.plot.name}-{seed.seed}")
            path.with_suffix(".json").write_text(to_json(every))
            save_pareto(every, path)


if __name__ == "__main__":
    main()
