"""What the twin says of choices that need the desktop: all figures are predicted, with ranges.

    python benchmarks/twin_choices.py [split | ram | reads | desktop ...]

Ranges are the twin's corners (`fomoe.sim.forecast.corners`): bad to good.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import replace

import numpy as np

from fomoe.routing import CacheAwareRouting
from fomoe.sim.decode import decode
from fomoe.sim.forecast import WARMUP, Corner, Question, Span, Twin, corners, in_corner, upgrades
from fomoe.sim.loads import Cache, Loads, open_residency, spread_layers
from fomoe.sim.machine import Machine, find_machine
from fomoe.sim.schedule import Schedule
from fomoe.sim.shapes import shape_by_name
from fomoe.types import Tier

SHAPE = shape_by_name("397b-a17b")
RULES = {"exact": None, "CAR 0.35": CacheAwareRouting(0.35)}


def said(machine: Machine, twin: Twin, recall: float | None = None) -> str:
    """Predict tokens per second in all corners, with the corners' recall unless one is given."""
    readings = corners(machine)
    if recall is not None:
        readings = tuple(replace(corner, recall=recall) for corner in readings)
    return span([twin.outcome(machine, corner).tokens_per_s for corner in readings])


def span(corners_say: list[float], pattern: str = "{:.2f}") -> str:
    """What the bad, the middle and the good corner say, as text."""
    each = Span.of(corners_say)
    low, mid, high = (pattern.format(figure) for figure in (each.low, each.mid, each.high))
    return f"predicted {mid} ({low} to {high})"


def hits(loads: list[Loads]) -> str:
    """The shares of activations by tier in the three corners."""
    tiers = zip(("device", "RAM", "NVMe"), zip(*(each.shares for each in loads), strict=True),
                strict=True)  # fmt: skip
    return ", ".join(f"{tier} {span(list(shares), '{:.1%}')}" for tier, shares in tiers)


def _with(twin: Twin, schedule: Schedule) -> Twin:
    other = Twin(twin.shape, replace(twin.question, schedule=schedule))
    other.share_traces(twin)
    return other


def split() -> None:
    """Ping-pong against expert-parallel."""
    for name in ("desktop", "two-desktops"):
        machine = find_machine(name)
        second = upgrades(machine)["a second drive like the first"]
        for name_of, rule in RULES.items():
            for title, which in ((name, machine), (f"{name}, second drive", second)):
                for kind in ("layers", "experts"):
                    twin = Twin(SHAPE, Question(rule=rule, schedule=Schedule(split=kind)))
                    print(f"{title:28} {name_of:9} split by {kind:8} {said(which, twin)}")


def ram() -> None:
    """The RAM tier's share of memory, and the page cache in its place."""
    machine = find_machine("desktop")
    whole = machine.host.ram_bytes - machine.host.reserved_bytes
    for gigabytes in (0, 8, 16, 20, 24, whole / 1e9):
        budget = gigabytes * 1e9
        twin = Twin(SHAPE, Question(ram_budget=budget))
        fit = twin.fit(machine)
        slots = hits([twin.loads(machine, fit, corner.slots) for corner in corners(machine)])
        print(f"{gigabytes:4.1f} GB, {fit.ram_slots:4.1f} slots: {said(machine, twin)}; {slots}")
        cached = [_page_cache(twin, machine, corner, budget) for corner in corners(machine)]
        print(f"{gigabytes:4.1f} GB as page cache: {span([speed for speed, _ in cached])}; "
              f"{hits([loads for _, loads in cached])}")  # fmt: skip


def _page_cache(twin: Twin, machine: Machine, corner: Corner, budget: float) -> tuple[float, Loads]:
    """Replay with no RAM tier, and one LRU of pages under all layers, which sees every read."""
    fit = twin.fit(machine)
    ids = twin.exact
    n_tokens, n_layers, _ = ids.shape
    sampled = n_layers / SHAPE.n_layers
    room = int(corner.slots * budget / SHAPE.expert_bytes.mean() * sampled)
    residency = open_residency(
        Cache(device_slots=fit.device_slots * corner.slots, ram_slots=0.0),
        (n_layers, SHAPE.n_experts, SHAPE.top_k),
    )
    pages: OrderedDict[tuple[int, int], None] = OrderedDict()
    counts = np.zeros((3, n_tokens - WARMUP, n_layers, 1), np.int16)
    for token in range(n_tokens):
        for layer in range(n_layers):
            wanted = ids[token, layer]
            missing = wanted[residency.tier_of(layer)[wanted] != Tier.DEVICE].tolist()
            residency.plan(layer, wanted)
            residency.release(layer)
            kept = 0
            for expert in missing:
                key = layer, expert
                kept += key in pages
                pages[key] = None
                pages.move_to_end(key)
            while len(pages) > room:
                pages.popitem(last=False)
            if token >= WARMUP:
                row = len(wanted) - len(missing), kept, len(missing) - kept
                counts[:, token - WARMUP, layer, 0] = row
    device, in_ram, nvme = (spread_layers(part, SHAPE.n_layers) for part in counts)
    loads = Loads(device=device, ram=in_ram, nvme=nvme, demoted=np.zeros_like(nvme))
    schedule = Schedule(recall=corner.recall)
    outcome = decode(in_corner(machine, corner), SHAPE, loads, schedule, context=2048)
    return outcome.tokens_per_s, loads


def reads() -> None:
    """How far ahead to guess, and in how many requests to read an expert."""
    machine = find_machine("desktop")
    base = Twin(SHAPE, Question())
    for depth in (1, 2, 3, 4):
        print(f"depth {depth}: {said(machine, _with(base, Schedule(depth=depth)))}")
    for waste in (0.0, 0.2, 0.5, 1.0):
        for depth in (1, 2):
            schedule = Schedule(waste=waste, depth=depth)
            print(f"waste {waste}, depth {depth}: {said(machine, _with(base, schedule))}")
    print(f"no guesses: {said(machine, base, recall=0.0)}")
    for pieces in (1, 2, 3, 6, 15, 30, 60):
        size = SHAPE.expert_bytes.mean() / pieces / 2**20
        print(f"{pieces:2} requests of {size:.2f} MiB: "
              f"{said(machine, _with(base, Schedule(pieces=pieces)))}")  # fmt: skip


def desktop() -> None:
    """Exact and CAR, as bought and with a second drive, by recall on misses."""
    machine = find_machine("desktop")
    boxes = {"desktop": machine, "with a second drive":
             upgrades(machine)["a second drive like the first"]}  # fmt: skip
    for title, box in boxes.items():
        for name_of, rule in RULES.items():
            twin = Twin(SHAPE, Question(rule=rule))
            print(f"{title:20} {name_of:9} {said(box, twin)}")
            for recall in (0.0, 0.1, 0.5, 0.85):
                print(f"  recall on misses {recall}: {said(box, twin, recall)}")


PARTS = {"split": split, "ram": ram, "reads": reads, "desktop": desktop}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
