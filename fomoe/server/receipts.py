"""Receipts as people and clients read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fomoe.engine.requests import PromptProgress, Receipt

UNMEASURED = "not measured"  # mode of an answer that was cut short without the engine's receipt

_SUMMED = (
    "prompt_tokens",
    "cached_tokens",
    "prompt_ms",
    "generated_tokens",
    "generated_ms",
    "hits_device",
    "hits_ram",
    "reads_nvme",
    "substituted",
    "prompt_hits_device",
    "prompt_hits_ram",
    "prompt_reads_nvme",
    "nvme_bytes",
    "ram_bytes",
    "demoted_bytes",
    "computed_in_ram",
    "prompt_bytes",
    "prefetch_bytes",
    "background_bytes",
    "shadow_bytes",
    "logical_bytes",
    "prefetched",
    "prefetched_used",
    "prefetched_dropped",
    "shadow_steps",
    "shadow_kl",
    "stall_ms",
    "lost_mass",
)


def tier_line(receipt: Receipt) -> str:
    """Return one line on an answer: its speed, where its experts lay, and whether it is exact.

    For example `38 tok/s | device 61 %  ram 12 %  nvme 27 % | exact`. The shares are of expert
    activations while generating (of the prompt's, where nothing was generated after it) and add
    up to 100 together with the substituted ones. An answer that may differ from the exact one
    says more, see `loss_line`.
    """
    speed = _speed(receipt.generated_tokens, receipt.generated_ms)
    if receipt.mode == UNMEASURED:
        return f"{speed} | experts not measured"
    counts = tuple(receipt.outcomes.values())
    prompt = (receipt.prompt_hits_device, receipt.prompt_hits_ram, receipt.prompt_reads_nvme, 0)
    whose = "" if any(counts) else " of the prompt"
    device, ram, nvme, substituted = percentages(counts if any(counts) else prompt)
    tiers = f"{receipt.devices} {device} %  ram {ram} %  nvme {nvme} %{whose}"
    if receipt.mode == "exact" and not receipt.substituted:
        return f"{speed} | {tiers} | exact"
    return f"{speed} | {tiers} | {loss_line(receipt, substituted)}"


def loss_line(receipt: Receipt, substituted: int) -> str:
    """Return what lossy routing did to an answer, and what was read for it, by cause.

    For example `kl=0.01, 21 % substituted, router mass lost 0.8 a token, KL 0.0083 nats (12
    steps), price 0.041 | read 9.1 MB on demand, 2 prefetch, 1.3 shadow`.
    """
    steps = max(1, receipt.generated_tokens - 1)  # the first token comes with the prompt
    said = [receipt.mode, f"{substituted} % substituted"]
    said.append(f"router mass lost {receipt.lost_mass / steps:.2g} a token")
    if receipt.estimated_kl is not None:
        said.append(f"KL {receipt.estimated_kl:.2g} nats ({receipt.shadow_steps} steps)")
    if receipt.price > 0.0:
        said.append(f"price {receipt.price:.2g}")
    demand, *others = receipt.bytes_by_cause.items()
    read = [f"read {demand[1] / 1e6:.3g} MB on demand"]
    read += [f"{n_bytes / 1e6:.3g} {cause}" for cause, n_bytes in others if n_bytes]
    return f"{', '.join(said)} | {', '.join(read)}"


def prompt_line(progress: PromptProgress) -> str:
    """Return one line on a prompt under way: how far, how fast, and how long it still takes.

    For example `prompt 320 of 1,024 tokens | 12 tok/s | 59 s left`; the rate is that of the layers
    done so far, tokens taken over from an earlier request left out.
    """
    done = progress.processed - progress.cached
    far = f"prompt {progress.processed:,} of {progress.total:,} tokens"
    if done <= 0 or progress.time_ms <= 0:
        return far
    left = (progress.total - progress.processed) * progress.time_ms / 1e3 / done
    return f"{far} | {_speed(done, progress.time_ms)} | {_duration(left)} left"


def _duration(seconds: float) -> str:
    """Return whole seconds, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def percentages(counts: Sequence[int]) -> list[int]:
    """Return whole percentages that add up to 100 (largest remainders are rounded up).

    They are all 0 where there is nothing to share.
    """
    total = sum(counts)
    if not total:
        return [0] * len(counts)
    shares = [100 * count // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda i: -(100 * counts[i] % total))
    for index in by_remainder[: 100 - sum(shares)]:
        shares[index] += 1
    return shares


def combined(receipts: Sequence[Receipt]) -> Receipt:
    """Return the sum of the receipts of one request's answers; the rest is the last one's."""
    if not receipts:
        return Receipt()
    sums: dict[str, Any] = {name: sum(getattr(r, name) for r in receipts) for name in _SUMMED}
    for name in ("prompt_parts_ms", "generated_parts_ms"):
        total: Counter[str] = Counter()
        for receipt in receipts:
            total.update(getattr(receipt, name))
        sums[name] = dict(total)
    return replace(receipts[-1], **sums)


def timings(receipt: Receipt) -> dict[str, Any]:
    """Return the `timings` of a response: llama.cpp's fields, and what the experts cost."""
    fresh = receipt.prompt_tokens - receipt.cached_tokens
    return {
        "cache_n": receipt.cached_tokens,
        "prompt_n": fresh,
        "prompt_ms": receipt.prompt_ms,
        "prompt_per_token_ms": receipt.prompt_ms / fresh if fresh else 0.0,
        "prompt_per_second": _rate(fresh, receipt.prompt_ms),
        "predicted_n": receipt.generated_tokens,
        "predicted_ms": receipt.generated_ms,
        "predicted_per_token_ms": (
            receipt.generated_ms / receipt.generated_tokens if receipt.generated_tokens else 0.0
        ),
        "predicted_per_second": _rate(receipt.generated_tokens, receipt.generated_ms),
        "fomoe": {
            "mode": receipt.mode,
            "devices": receipt.devices,
            "hit": {
                "device": receipt.hits_device,
                "ram": receipt.hits_ram,
                "nvme": receipt.reads_nvme,
            },
            "prompt_hit": {
                "device": receipt.prompt_hits_device,
                "ram": receipt.prompt_hits_ram,
                "nvme": receipt.prompt_reads_nvme,
            },
            "substituted": receipt.substituted,
            "router_mass_lost": receipt.lost_mass,
            "estimated_kl": receipt.estimated_kl,
            "shadow_steps": receipt.shadow_steps,
            "price": receipt.price,
            "bytes": receipt.bytes_by_cause,
            "logical_bytes": receipt.logical_bytes,
            "nvme_bytes": receipt.nvme_bytes,
            "ram_bytes": receipt.ram_bytes,
            "demoted_bytes": receipt.demoted_bytes,
            "cpu_arm": {"table": receipt.cpu_arm, "computed": receipt.computed_in_ram},
            "prefetch": prefetch_report(receipt),
            "stall_ms": receipt.stall_ms,
            "prompt_parts_ms": receipt.prompt_parts_ms,
            "predicted_parts_ms": receipt.generated_parts_ms,
            "logical_capacity": receipt.logical_capacity,
            "decision_hash": receipt.decision_hash,
        },
    }


def prefetch_report(receipt: Receipt) -> dict[str, Any]:
    """Return what became of experts that were asked for before the router spoke.

    `precision` is of those that were read, `recall` of the experts that no tier held when they
    were wanted, or asked for ahead; null without any.
    """
    read = receipt.prefetched - receipt.prefetched_dropped
    used, misses = receipt.prefetched_used, receipt.reads_nvme
    return {
        "asked": receipt.prefetched,
        "used": used,
        "dropped": receipt.prefetched_dropped,
        "precision": used / read if read > 0 else None,
        "recall": used / misses if misses > 0 else None,
    }


def usage(prompt: int, cached: int, generated: int, reasoning: int) -> dict[str, Any]:
    """Return the `usage` of a response; all arguments are numbers of tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def _rate(tokens: int, milliseconds: float) -> float:
    return tokens * 1e3 / milliseconds if milliseconds > 0 else 0.0


def _speed(tokens: int, milliseconds: float) -> str:
    """Return tokens per second; one token comes with the prompt and says nothing about speed."""
    rate = _rate(tokens, milliseconds) if tokens > 1 else 0.0
    if rate == 0.0:
        return "- tok/s"
    return f"{rate:.0f} tok/s" if rate >= 10 else f"{rate:.2g} tok/s"
