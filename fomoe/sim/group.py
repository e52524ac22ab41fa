"""Texts of a trace that are decided side by side, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fomoe.engine.decisions import TALLIES, Decider
from fomoe.residency.logical import LogicalCaches
from fomoe.sim.losses import LOSSES, losses_of
from fomoe.sim.policies import Policy
from fomoe.sim.strengths import Strengths
from fomoe.traces import Trace

COUNTS = ("tokens", "wanted", "demand", "background", "substituted", "dropped")
COSTS = (*COUNTS, *LOSSES)
_BLOCK_TOKENS = 32

Floats = npt.NDArray[np.float64]
_Number = TypeVar("_Number", np.int32, np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Some tokens of the texts, of each the next ones; arrays [tokens, L, texts, ...].

    Attributes:
        ids: int32 [..., C], candidates.
        p: float32 [..., C], their probabilities.
        is_prompt: bool [tokens, texts].
        is_scored: bool [tokens, texts]; False where a text has ended.
        running: how many texts have each token; the longer ones come first.
    """

    ids: npt.NDArray[np.int32]
    p: npt.NDArray[np.float32]
    is_prompt: npt.NDArray[np.bool_]
    is_scored: npt.NDArray[np.bool_]
    running: list[int]


def scored_tokens(trace: Trace, rows: npt.NDArray[np.int64], warmup: int) -> npt.NDArray[np.bool_]:
    """Say which tokens of a text are scored: those of decode, from the warm-up on."""
    scored = ~trace.prompt_among(rows)
    scored[:warmup] = False
    return scored


class TextGroup:
    """Some texts of a trace, their caches side by side in `LogicalCaches`."""

    def __init__(self, trace: Trace, texts: Sequence[npt.NDArray[np.int64]], warmup: int) -> None:
        self._trace = trace
        # The longest first, so that the texts that still run are the first rows.
        self._order = np.argsort([-len(rows) for rows in texts], kind="stable")
        self._texts = [texts[i] for i in self._order]
        self._scored = [scored_tokens(trace, rows, warmup) for rows in self._texts]

    def run(self, policy: Policy, capacity: int) -> Floats:
        """Return the sums of `COSTS` under a policy that has a rule: float64 [texts, L, costs].

        Raises:
            ConfigError: policy or capacity do not fit the trace's model.
        """
        facts, n_texts = self._trace.facts, len(self._texts)
        rules = policy.logical_rules(capacity)
        caches = LogicalCaches(n_texts, facts.n_layers, facts.n_experts, rules)
        assert policy.rule is not None
        decider = Decider(policy.rule, caches, facts.top_k)
        strengths = Strengths(policy.rule, n_texts, policy.budget_bytes, facts.expert_bytes)
        needs_head = strengths.is_lossy or rules.eviction == "mass"
        kept = facts.candidates if needs_head else facts.top_k
        sums = np.zeros((n_texts, facts.n_layers, len(COSTS)))
        for start in range(0, max(map(len, self._texts), default=0), _BLOCK_TOKENS):
            block = self._block(start, kept)
            _add(sums, block, _decide(block, decider, strengths), facts.top_k)
        by_text = np.empty_like(sums)
        by_text[self._order] = sums
        return by_text

    def _block(self, start: int, kept: int) -> Block:
        trace, n_texts = self._trace, len(self._texts)
        count = min(_BLOCK_TOKENS, len(self._texts[0]) - start)
        shape = count, trace.facts.n_layers, n_texts, kept
        block = Block(
            np.zeros(shape, np.int32), np.zeros(shape, np.float32),
            np.zeros((count, n_texts), np.bool_), np.zeros((count, n_texts), np.bool_), [],
        )  # fmt: skip
        for i, rows in enumerate(self._texts):
            own = rows[start : start + count]
            part, n = trace.records[own], len(own)
            block.ids[:n, :, i] = part["ids"][..., :kept]
            block.p[:n, :, i] = part["probabilities"][..., :kept]
            block.is_prompt[:n, i] = trace.prompt_among(own)
            block.is_scored[:n, i] = self._scored[i][start : start + count]
        lengths = np.array([len(rows) for rows in self._texts])
        block.running.extend(int((lengths > start + t).sum()) for t in range(count))
        return block


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """What a block's tokens run, arrays [tokens, L, texts, ...].

    Attributes:
        tally: int64 [..., 3], demand reads, background reads and substitutes, as in `Decisions`.
        ids: int32 [..., k], -1 for what is dropped; empty where the rule is exact.
        weights: float32 [..., k], likewise.
    """

    tally: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


def _decide(block: Block, decider: Decider, strengths: Strengths) -> Chosen:
    """Decide a block's tokens one after the other, each layer of all texts in one call."""
    shape = block.ids.shape[:3]
    k = decider.k if strengths.is_lossy else 0
    tally = np.zeros((*shape, TALLIES), np.int64)
    ids, weights = np.zeros((*shape, k), np.int32), np.zeros((*shape, k), np.float32)
    for t, n in enumerate(block.running):
        is_prompt = block.is_prompt[t, :n]
        prices = strengths.at(is_prompt)
        for layer in range(shape[1]):
            head = block.ids[t, layer, :n], block.p[t, layer, :n]
            made = decider.decide_compact(layer, *head, None, prices)
            tally[t, layer, :n] = made.tally
            if k:
                ids[t, layer, :n] = made.ids
                weights[t, layer, :n] = made.weights
        if strengths.is_steered:
            strengths.spent(is_prompt, tally[t, :, :n, :2].sum(axis=2))
    return Chosen(tally, ids, weights)


def _add(sums: Floats, block: Block, chosen: Chosen, k: int) -> None:
    """Add a block's costs to `sums`."""
    scored = block.is_scored
    per_text = scored.sum(axis=0)
    sums[:, :, 0] += per_text[:, None]
    sums[:, :, 1] += k * per_text[:, None]
    counted = chosen.tally * scored[:, None, :, None]
    sums[:, :, 2 : 2 + TALLIES] += counted.sum(axis=0).swapaxes(0, 1)
    if not chosen.ids.size:
        return
    token, text = scored.nonzero()
    at = token, slice(None), text
    run = chosen.ids[at]
    losses = losses_of(
        _flat(block.ids[at]), _flat(block.p[at]), _flat(run), _flat(chosen.weights[at])
    )
    dropped = (run < 0).sum(axis=2)
    np.add.at(sums[:, :, COUNTS.index("dropped")], text, dropped)
    by_row = losses.reshape(len(token), sums.shape[1], len(LOSSES))
    np.add.at(sums[:, :, len(COUNTS) :], text, by_row)


def _flat(array: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
    return np.ascontiguousarray(array.reshape(-1, array.shape[-1]))
