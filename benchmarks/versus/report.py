"""From runs to a result: medians, spread, ratio, and what the drive's share of it was."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from versus.duel import Outcome
from versus.items import Item


def result(item: Item, outcome: Outcome, recipe: dict[str, Any], threads: int) -> dict[str, Any]:
    """Return everything about one item as plain data."""
    key = "decode_ms" if item.decode else "prompt_ms"
    ours = [run[key] / item.unit_tokens for run in outcome.fomoe]
    theirs = [run[key] / item.unit_tokens for run in outcome.llama]
    # Of pairs, not of medians: the machine's pace drifts over a session, for both alike.
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {
        "item": asdict(item),
        "threads": threads,
        "machine": machine(),
        "ratio": round(statistics.median(ratios), 4),
        "fomoe": _summary(ours),
        "llama": _summary(theirs),
        "pair_ratios": [round(ratio, 4) for ratio in ratios],
        "others_cores": max(run["others_cores"] for run in outcome.fomoe + outcome.llama),
        "drive": _drive(outcome),
        "llama_settings": asdict(outcome.best),
        "llama_trials": [asdict(trial) for trial in outcome.trials],
        "llama_info": outcome.llama_info,
        "fomoe_info": outcome.fomoe_info,
        "runs": {"fomoe": outcome.fomoe, "llama": outcome.llama},
        "recipe": recipe,
    }


def _summary(values: list[float]) -> dict[str, float]:
    """Milliseconds per token: median, spread, and the median as a rate."""
    middle = statistics.median(values)
    return {
        "ms_per_token": round(middle, 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
        "tokens_per_s": round(1e3 / middle, 2),
    }


def _drive(outcome: Outcome) -> dict[str, Any]:
    """What fomoe read, and how fast while a demand read was under way. Empty without a limit.

    Bytes are those of experts, without the pages around them that a direct read moves along.
    """
    if not outcome.limits:
        return {}
    runs = [run["reads"] for run in outcome.fomoe]
    seconds = sum(r["demand_open_s"] for r in runs)
    rate = sum(r["demand_bytes"] for r in runs) / seconds if seconds else 0.0
    return outcome.limits | {
        "read_bytes_per_run": round(sum(r["bytes"] for r in runs) / len(runs)),
        "prefetch_bytes_per_run": round(sum(r["prefetch_bytes"] for r in runs) / len(runs)),
        "demand_bytes_per_s": round(rate),
        "demand_share": round(rate / max(outcome.limits["direct"].values()), 3),
    }


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    info = Path("/proc/cpuinfo").read_text()
    model = next(line.split(":")[1] for line in info.splitlines() if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model.strip(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "load": os.getloadavg()[0],
    }


def text(data: dict[str, Any]) -> str:
    """Return the result for people."""
    item, ours, theirs = data["item"], data["fomoe"], data["llama"]
    lines = [
        f"{item['title']}: {data['ratio']:.2f} (bar {item['bar']})",
        f"  fomoe     {ours['tokens_per_s']:9.2f} tok/s, {ours['ms_per_token']:.2f} ms per token "
        f"({ours['least']:.2f} to {ours['most']:.2f})",
        f"  llama.cpp {theirs['tokens_per_s']:9.2f} tok/s, {theirs['ms_per_token']:.2f} ms per "
        f"token ({theirs['least']:.2f} to {theirs['most']:.2f})",
        f"  pairs {', '.join(f'{r:.2f}' for r in data['pair_ratios'])}; {data['threads']} threads; "
        f"others used up to {data['others_cores']} cores",
        f"  llama-cpp-python {data['llama_info']['version']}: {data['llama_info']['system']}",
    ]
    if drive := data["drive"]:
        direct = ", ".join(f"{k} {v / 1e9:.2f}" for k, v in drive["direct"].items())
        lines.append(
            f"  limit {drive['memory_bytes'] / 1e9:.2f} GB; O_DIRECT GB/s: {direct}; fomoe read "
            f"{drive['read_bytes_per_run'] / 1e9:.2f} GB per run (all experts: "
            f"{drive['expert_bytes'] / 1e9:.2f}), on demand "
            f"{drive['demand_bytes_per_s'] / 1e9:.2f} GB/s ({drive['demand_share']:.0%})"
        )
    if data["recipe"]:
        lines.append(f"  recipe {data['recipe']}")
    return "\n".join(lines)
