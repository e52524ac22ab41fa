"""One layer step of one device: who takes part, which arrays are written, what must travel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.actors.channel import Receiver, Regions, Sender
from fomoe.actors.layout import StepViews
from fomoe.engine.transfers import SegmentSlots
from fomoe.model.buffers import F32
from fomoe.routing import ExpertGroups, Route


@dataclass(slots=True)
class DeviceLink:
    """The driver's ends of one device's rings and the views of its step arena."""

    name: str
    node: int
    arena: str
    sender: Sender
    receiver: Receiver
    views: tuple[StepViews, ...]


@dataclass(slots=True)
class NodeLink:
    """The driver's ends of one node's storage rings, and what lies in that node's segment."""

    name: str
    sender: Sender
    receiver: Receiver
    slots: SegmentSlots


@dataclass(slots=True)
class Step:
    """The layer under way; experts are ordered resident first, in waves that fit the slots."""

    layer: int
    tokens: int
    id: int
    device: DeviceLink
    views: StepViews
    buffer: int
    experts: npt.NDArray[np.int32]
    pairs: npt.NDArray[np.int64]  # (token, expert) pairs of each expert, substitutes left out
    wave: int
    sent: int
    decoding: bool


def write_route(views: StepViews, groups: ExpertGroups, by_tier: npt.NDArray[np.intp],
                 counts: npt.NDArray[np.int64], weights: F32) -> None:  # fmt: skip
    """Write the route with pairs renumbered so that experts stand in the order they are served."""
    n, pairs, tokens = len(by_tier), len(groups.pair_token), len(weights)
    views.pair_start[0] = 0
    np.cumsum(counts, out=views.pair_start[1 : n + 1])
    moved = np.empty(n, np.int32)  # by how much each expert's pairs move
    moved[by_tier] = views.pair_start[:n] - groups.pair_start[by_tier]
    new_of_old = np.arange(pairs, dtype=np.int32) + np.repeat(moved, np.diff(groups.pair_start))
    views.pair_token[new_of_old] = groups.pair_token
    np.copyto(views.order[:tokens], new_of_old[groups.order])
    np.copyto(views.weights[:tokens], weights)


def substituted_pairs(route: Route, groups: ExpertGroups) -> npt.NDArray[np.int64]:
    """Return how many pairs of each of the groups' experts stand in for another expert."""
    replaced = np.bincount(route.ids[route.substituted], minlength=int(groups.experts[-1]) + 1)
    return replaced[groups.experts]


_ENTRY_PARTS = (("address", 8), ("generation", 8), ("slot", 4), ("expert", 4))


def regions(step: Step, first: int, end: int) -> Regions:
    """Return the arena ranges that the device must see for a wave."""
    views, at, name = step.views, step.views.offsets, step.device.arena
    entries = tuple(
        (name, at[part] + first * size, (end - first) * size) for part, size in _ENTRY_PARTS
    )
    if first:
        return entries
    pairs = step.tokens * views.order.shape[1]
    return (
        *entries,
        (name, at["x"], step.tokens * views.x.shape[1] * 4),
        (name, at["order"], pairs * 4),
        (name, at["weights"], pairs * 4),
        (name, at["pair_token"], pairs * 4),
        (name, at["pair_start"], (len(step.experts) + 1) * 4),
    )
