"""Routing rules on a decoding model: every arm a rule, every row a window, all side by side.

An arm's rows share their texts with every other arm's and differ in what their rule lets run. The
rules and logical caches are fomoe's own native code (`fomoe.engine.decisions`): scores come to the
host, decisions go back.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from decode import Choice, LabDecoder
from torch import Tensor

from fomoe.engine.decisions import Decider, Decisions
from fomoe.residency.logical import LogicalCaches, LogicalRules
from fomoe.routing.rules import ExactRouting, RoutingRule

COLD = 64  # first decoded tokens, told apart


@dataclass(frozen=True, slots=True)
class Arm:
    """A rule on a logical cache."""

    name: str
    rule: RoutingRule
    cache: LogicalRules


@dataclass(frozen=True, slots=True, eq=False)
class Tally:
    """What an arm did in each window: float64 [S], means over its decoded tokens.

    `demand`, `background`, `substituted` and `dropped` are shares of its activations, `lost` is
    the part of the wanted weight that did not run, `cold_nll` the mean over the first 64 tokens.
    """

    nll: np.ndarray
    cold_nll: np.ndarray
    kl: np.ndarray
    top1: np.ndarray
    demand: np.ndarray
    background: np.ndarray
    substituted: np.ndarray
    dropped: np.ndarray
    lost: np.ndarray

    @property
    def reads(self) -> np.ndarray:
        """All reads as a share of activations."""
        return self.demand + self.background


class Counts:
    """Sums over layers and tokens of what a decider decided, float64 [S]."""

    def __init__(self, rows: int) -> None:
        self.demand, self.background, self.substituted, self.dropped, self.lost = np.zeros(
            (5, rows)
        )

    def add(self, d: Decisions) -> None:
        """Count one layer's decisions."""
        self.demand += d.read.sum(1)
        self.background += (d.background >= 0).sum(1)
        self.substituted += d.substituted.sum(1)
        self.dropped += (d.ids < 0).sum(1)
        self.lost += d.lost


class Bench:
    """Windows of a text whose first `prefix` tokens have gone through a model exactly."""

    def __init__(self, decoder: LabDecoder, ids: np.ndarray, prefix: int, threads: int) -> None:
        self.decoder = decoder
        self.k = decoder.config.num_experts_per_tok
        self.n_layers, self.n_experts = (
            decoder.config.num_hidden_layers,
            decoder.config.num_experts,
        )
        self.device = decoder.embed.device
        self.ids = torch.tensor(ids, device=self.device)
        self.prefix = prefix
        self.pool = ThreadPoolExecutor(threads)
        self.caches: dict[LogicalRules, LogicalCaches] = {}
        self.state = decoder.new_state(*ids.shape)

    def prefill(self, kinds: Sequence[LogicalRules], wanted: np.ndarray | None = None) -> None:
        """Run the prefix exactly, on one set of caches of each kind.

        `wanted` uint8 [S, T, L, k] receives the experts of the prefix in its first tokens.
        """
        rows, shape = len(self.ids), (self.n_layers, self.n_experts)
        self.caches = {rules: LogicalCaches(rows, *shape, rules) for rules in kinds}
        loop = _Loop(
            self, [Decider(ExactRouting(), caches, self.k) for caches in self.caches.values()]
        )

        def route(layer: int, scores: Tensor) -> Choice:
            exact = loop.route(layer, scores.repeat(len(kinds), 1))
            return Choice(exact.ids[:rows], exact.weights[:rows])

        for t in range(self.prefix):
            loop.wanted = None if wanted is None else wanted[:, t]
            self.decoder.step(self.ids[:, t], self.state, route, logits=False)

    def fork(self, rules: LogicalRules) -> LogicalCaches:
        """Return caches of a kind as they were after the prefix."""
        caches = LogicalCaches(len(self.ids), self.n_layers, self.n_experts, rules)
        caches.restore(self.caches[rules].snapshot())
        return caches

    def run(
        self, arms: Sequence[Arm], steps: int | None = None, wanted: np.ndarray | None = None
    ) -> dict[str, Tally]:
        """Decode the windows' own tokens under each arm; the first arm must be exact.

        Args:
            arms: rules, at most as many as memory holds states.
            steps: decoded tokens; None takes the rest of the windows.
            wanted: uint8 [S, T, L, k], receives the first arm's experts behind the prefix.

        Returns:
            By name of the arm.
        """
        assert isinstance(arms[0].rule, ExactRouting)
        steps = self.ids.shape[1] - 1 - self.prefix if steps is None else steps
        loop = _Loop(self, [Decider(a.rule, self.fork(a.cache), self.k) for a in arms])
        state = self.state.repeat(len(arms))
        scores = _Scores(len(arms), len(self.ids), steps, self.device)
        for t in range(steps):
            at = self.prefix + t
            loop.wanted = None if wanted is None else wanted[:, at]
            logits = self.decoder.step(self.ids[:, at].repeat(len(arms)), state, loop.route)
            scores.add(t, logits.view(len(arms), len(self.ids), -1), self.ids[:, at + 1])
        return {
            arm.name: scores.tally(i, loop.counts[i], steps, (self.n_layers, self.k))
            for i, arm in enumerate(arms)
        }


class _Loop:
    """The routing callback: one native decision per arm and layer."""

    def __init__(self, bench: Bench, deciders: Sequence[Decider]) -> None:
        self._bench, self._deciders = bench, deciders
        rows = len(bench.ids)
        self.counts = [Counts(rows) for _ in deciders]
        self._outs = [Decisions.empty(rows, bench.k) for _ in deciders]
        pinned = bench.device.type == "cuda"
        shape = len(deciders), rows
        self._scores = torch.zeros(*shape, bench.n_experts, pin_memory=pinned)
        self._ids = torch.zeros(*shape, bench.k, dtype=torch.int32, pin_memory=pinned)
        self._weights = torch.zeros(*shape, bench.k, pin_memory=pinned)
        self.wanted: np.ndarray | None = None

    def route(self, layer: int, scores: Tensor) -> Choice:
        """Decide a layer for all rows."""
        self._scores.copy_(scores.view(self._scores.shape))
        jobs = [
            self._bench.pool.submit(self._decide, arm, layer) for arm in range(len(self._deciders))
        ]
        for job in jobs:
            job.result()
        if self.wanted is not None:
            self.wanted[:, layer] = self._outs[0].wanted
        device = self._bench.device
        ids = self._ids.to(device, non_blocking=True).view(-1, self._bench.k)
        weights = self._weights.to(device, non_blocking=True).view(-1, self._bench.k)
        return Choice(ids.clamp_min(0).long(), weights)

    def _decide(self, arm: int, layer: int) -> None:
        out = self._outs[arm]
        scores = self._scores[arm].numpy()
        self._deciders[arm].decide(layer, scores, None, None, out)
        self._ids[arm].numpy()[:] = out.ids
        self._weights[arm].numpy()[:] = out.weights
        self.counts[arm].add(out)


class _Scores:
    """Losses of every row, gathered on the device."""

    def __init__(self, arms: int, rows: int, steps: int, device: torch.device) -> None:
        self.nll = torch.zeros(arms, rows, steps, device=device)
        self.kl = torch.zeros(arms, rows, steps, device=device)
        self.same = torch.zeros(arms, rows, device=device)

    def add(self, t: int, logits: Tensor, target: Tensor) -> None:
        """Score one step; logits [A, S, V], target [S]."""
        logs = logits.log_softmax(-1)
        at = target[None, :, None].expand(len(logs), -1, 1)
        self.nll[:, :, t] = -logs.gather(2, at)[..., 0]
        exact = logs[0]
        p, best = exact.exp(), exact.argmax(-1)
        for arm, other in enumerate(logs):
            self.kl[arm, :, t] = (p * (exact - other)).sum(-1)
            self.same[arm] += other.argmax(-1) == best

    def tally(self, arm: int, counts: Counts, steps: int, shape: tuple[int, int]) -> Tally:
        """Return an arm's means by window; `shape` is layers and experts per token."""

        def mean(values: Tensor) -> np.ndarray:
            return values.double().mean(-1).cpu().numpy()

        n_layers, k = shape
        activations = steps * n_layers * k
        return Tally(
            nll=mean(self.nll[arm]),
            cold_nll=mean(self.nll[arm, :, :COLD]),
            kl=mean(self.kl[arm]),
            top1=(self.same[arm].double() / steps).cpu().numpy(),
            demand=counts.demand / activations,
            background=counts.background / activations,
            substituted=counts.substituted / activations,
            dropped=counts.dropped / activations,
            lost=counts.lost / (steps * n_layers),
        )
