"""Scores a policy on a trace: what it reads and what it loses, per text and layer.

The decisions are the engine's own (`engine.decisions`), from the head of each row that a trace has.
Each text has its own logical caches. Prompt tokens run exactly and fill them; they and a text's
first `warmup` tokens are not scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fomoe.errors import ConfigError
from fomoe.sim.belady import belady_misses
from fomoe.sim.group import COSTS, TextGroup, scored_tokens
from fomoe.sim.policies import Policy, parse_policy
from fomoe.traces import Trace

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

GROUP_TEXTS = 16  # decided in one call, which costs about as much as a few rows


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """Some texts under one policy: what `run_point` needs, in a form that can be sent elsewhere.

    Attributes:
        trace: the file.
        texts: int64 [n], of each text its records.
        policy: spec of the policy.
        capacity: experts that each layer may hold.
        warmup: first tokens of a text that are not scored.
    """

    trace: Path
    texts: tuple[Rows, ...]
    policy: str
    capacity: int
    warmup: int = 0


def run_point(point: Point) -> Floats:
    """Return the sums of `COSTS` over the scored tokens of each text: float64 [texts, L, costs].

    Losses are summed over tokens, reads counted in experts. Depends on the trace and the point
    alone.

    Raises:
        TraceError: the trace cannot be read.
        ConfigError: the policy or the capacity makes no sense.
    """
    trace = Trace.open(point.trace)
    policy = parse_policy(point.policy)
    if policy.rule is None:
        texts = [_optimum(trace, rows, point) for rows in point.texts]
        return np.stack(texts)
    return TextGroup(trace, point.texts, point.warmup).run(policy, point.capacity)


def _optimum(trace: Trace, rows: Rows, point: Point) -> Floats:
    facts = trace.facts
    scored = scored_tokens(trace, rows, point.warmup)
    ids = trace.ids[rows, :, : facts.top_k].astype(np.int32)
    missed = belady_misses(ids, scored, point.capacity, facts.n_experts)
    sums = np.zeros((facts.n_layers, len(COSTS)))
    sums[:, COSTS.index("tokens")] = int(scored.sum())
    sums[:, COSTS.index("wanted")] = int(scored.sum()) * facts.top_k
    sums[:, COSTS.index("demand")] = missed.sum(axis=(0, 2))
    return sums


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """A policy at a capacity over a whole trace: `costs` float64 [texts, L, costs]."""

    policy: Policy
    capacity: int
    costs: Floats

    def sums(self, name: str) -> Floats:
        """Return the sums of one of `COSTS`, float64 [texts, L]."""
        sums: Floats = self.costs[:, :, COSTS.index(name)]
        return sums


Mapper = Callable[[Callable[[Point], Floats], list[Point]], Iterable[Floats]]


def replay(
    trace: Trace, policies: list[Policy], capacities: list[int], *, warmup: int = 0,
    mapper: Mapper = map,
) -> Iterator[Score]:  # fmt: skip
    """Score every policy at every capacity.

    Args:
        trace: a trace that lies in a file.
        policies: what is scored.
        capacities: experts that each layer may hold, k to E.
        warmup: first tokens of each text that fill the caches and are not scored.
        mapper: applies a function to points, in order; `map` does it here.

    Raises:
        ConfigError: a capacity does not fit the model, or nothing would be scored.
    """
    facts, texts = trace.facts, trace.sequences
    for capacity in capacities:
        if not facts.top_k <= capacity <= facts.n_experts:
            raise ConfigError(
                f"capacity {capacity}: {facts.model} takes {facts.top_k} of {facts.n_experts} "
                f"experts per token, give a number between these"
            )
    if not any(scored_tokens(trace, text.rows, warmup).any() for text in texts):
        raise ConfigError(
            f"{trace.path}: {len(trace):,} tokens, none of them of decode and behind a warm-up of "
            f"{warmup:,}; record longer answers, or lower --warmup"
        )
    cells = [(policy, capacity) for capacity in capacities for policy in policies]
    groups = list(grouped([text.rows for text in texts]))
    points = [
        Point(trace.path, group, policy.text, capacity, warmup)
        for policy, capacity in cells
        for group in groups
    ]
    results = iter(mapper(run_point, points))
    for policy, capacity in cells:
        yield Score(policy, capacity, np.concatenate([next(results) for _ in groups]))


def grouped(texts: list[Rows]) -> Iterator[tuple[Rows, ...]]:
    """Split texts into groups of like size."""
    n_groups = -(-len(texts) // GROUP_TEXTS)
    for part in np.array_split(np.arange(len(texts)), max(n_groups, 1)):
        yield tuple(texts[i] for i in part)
