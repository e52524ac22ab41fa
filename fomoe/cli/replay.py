"""`fomoe replay`: scores routing rules and evictions on a recorded trace, without the model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fomoe.errors import ConfigError
from fomoe.sim.bounds import Uses, text_uses
from fomoe.sim.group import scored_tokens
from fomoe.sim.policies import Policy, parse_policy
from fomoe.sim.replay import Mapper, Score
from fomoe.sim.replay import replay as scores_of
from fomoe.sim.report import bounds_of, figures_of, gap_of, table_of
from fomoe.traces import Trace, TraceFacts

_PARTS = (10, 6, 4)  # of a layer's experts one in so many is held unless told otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Where the work is done."""

    parallel: Annotated[
        bool, typer.Option("--parallel", help="Use all cores of a Ray cluster.")
    ] = False
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Cluster of --parallel; found by itself if local."),
    ] = None

    def mapper(self) -> Mapper:
        """Return what applies a function to points."""
        if not self.parallel:
            return map
        # Imported here because Ray takes a second.
        from fomoe.actors.points import map_points

        return partial(map_points, address=self.address)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is scored."""

    policy: Annotated[
        str,
        typer.Option(
            metavar="SPEC[,SPEC...]",
            help="Policies: exact, car=X, price=X, bytes=SIZE, drop=X or belady, and behind "
            "a + what the caches evict (lru, lfru, mass) or background=N, protected=N, kappa=X.",
        ),
    ] = "lru,lfru,belady"
    capacity: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="Experts that each layer may hold; by default a tenth, a sixth and a quarter of "
            "those that it has.",
        ),
    ] = None
    warmup: Annotated[
        int, typer.Option(metavar="N", min=0, help="First tokens of a text that are not scored.")
    ] = 0
    bounds: Annotated[
        bool,
        typer.Option("--bounds", help="Say what a policy's bytes must leave out; takes a while."),
    ] = False


def _capacities(text: str | None, facts: TraceFacts) -> list[int]:
    """Return the capacities asked for, or some that suit the model."""
    if text is None:
        return sorted({max(facts.top_k, facts.n_experts // part) for part in _PARTS})
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"capacity {text!r}: write whole numbers with commas between, such as 50,86"
        ) from None


def _policies(text: str) -> list[Policy]:
    """Return the policies asked for; exact ones are joined by what they are held against."""
    policies = [parse_policy(part) for part in text.split(",")]
    if any(policy.is_exact for policy in policies):
        for name in ("lru", "belady"):
            if name not in [policy.text for policy in policies]:
                policies.append(parse_policy(name))
    return policies


def _uses(trace: Trace, capacity: int, warmup: int) -> Iterator[Uses]:
    for text in trace.sequences:
        scored = scored_tokens(trace, text.rows, warmup)
        yield from text_uses(trace, text.rows, scored, capacity)


def _figures(scores: list[Score], trace: Trace, asked: Asked) -> list[dict[str, Any]]:
    by_name = {(score.policy.text, score.capacity): score for score in scores}
    uses: dict[int, list[Uses]] = {}
    results = []
    for score in scores:
        figures = figures_of(score, trace)
        if score.policy.is_exact:
            lru, optimum = (by_name[name, score.capacity] for name in ("lru", "belady"))
            figures["gap"] = gap_of(score, lru, optimum)
        elif asked.bounds:
            if score.capacity not in uses:
                uses[score.capacity] = list(_uses(trace, score.capacity, asked.warmup))
            figures["bounds"] = bounds_of(score, uses[score.capacity])
        results.append(figures)
    return results


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="File of --trace.")],
    asked: Asked,
    workers: Workers,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score caching and routing policies on a trace: bytes by cause, and what they lose."""
    read = Trace.open(trace)
    read.verify()
    policies, capacities = _policies(asked.policy), _capacities(asked.capacity, read.facts)
    started = time.perf_counter()
    scores = list(
        scores_of(read, policies, capacities, warmup=asked.warmup, mapper=workers.mapper())
    )
    seconds = time.perf_counter() - started
    results = _figures(scores, read, asked)
    tokens = len(read) * len(scores)
    if as_json:
        facts = {"trace": str(trace), "model": read.facts.model, "texts": len(read.sequences)}
        typer.echo(json.dumps({**facts, "tokens_per_s": tokens / seconds, "results": results}))
        return
    for line in table_of(results):
        typer.echo(line)
    typer.echo(f"{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} per second")
