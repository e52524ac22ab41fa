"""A KL contract on a decoding model: prices steered by sampled exact twins of single steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from closed_loop import Arm, Bench, Counts
from decode import Choice
from torch import Tensor

from fomoe.engine.decisions import Decider, Decisions
from fomoe.routing.price import NANO, LossPrice, is_sampled


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What a contract gave in each window: float64 [S, steps] losses, [S] shares.

    `kl` is KL(exact, policy) of two runs over the same text, `sampled` the mean loss that the
    exact twins saw, from the policy's own state. `exact_reads` is what exact routing reads,
    `demand` what the policy reads and `shadow` what the twins add, all over wanted activations.
    """

    kl: np.ndarray
    nll: np.ndarray
    exact_nll: np.ndarray
    sampled: np.ndarray
    exact_reads: np.ndarray
    demand: np.ndarray
    shadow: np.ndarray
    price: np.ndarray


def hold(bench: Bench, exact: Arm, policy: Arm, target: float, every: int) -> Held:
    """Decode the windows with prices that hold a mean loss of `target` nats per token.

    Args:
        bench: windows after their prefix.
        exact: the reference.
        policy: the rule whose price is steered, each window on its own.
        target: of the controller.
        every: one step in so many has a twin.
    """
    rows, steps = len(bench.ids), bench.ids.shape[1] - 1 - bench.prefix
    run = _Run(bench, exact, policy)
    prices = [LossPrice.towards(target) for _ in range(rows)]
    state = bench.state.repeat(2)
    kl, nll, plain = (torch.zeros(rows, steps, device=bench.device) for _ in range(3))
    sampled, n_sampled = np.zeros(rows), 0
    for t in range(steps):
        at = bench.prefix + t
        run.prices = np.array([p.price for p in prices], np.float32)
        twin = state.rows_from(rows) if is_sampled(t, every) else None
        logits = bench.decoder.step(bench.ids[:, at].repeat(2), state, run.route)
        reference, ours = logits.log_softmax(-1).view(2, rows, -1)
        target_ids = bench.ids[:, at + 1, None]
        kl[:, t] = (reference.exp() * (reference - ours)).sum(-1)
        nll[:, t], plain[:, t] = (-x.gather(1, target_ids)[:, 0] for x in (ours, reference))
        if twin is not None:
            other = bench.decoder.step(bench.ids[:, at], twin, run.shadow).log_softmax(-1)
            loss = (other.exp() * (other - ours)).sum(-1).cpu().numpy()
            prices = [p.after(round(float(x) * NANO)) for p, x in zip(prices, loss, strict=True)]
            sampled, n_sampled = sampled + loss, n_sampled + 1
    share = steps * bench.n_layers * bench.k
    return Held(
        kl=kl.cpu().numpy(),
        nll=nll.cpu().numpy(),
        exact_nll=plain.cpu().numpy(),
        sampled=sampled / max(n_sampled, 1),
        exact_reads=run.counts[0].demand / share,
        demand=run.counts[1].demand / share,
        shadow=run.shadow_reads / share,
        price=np.array([p.price for p in prices]),
    )


class _Run:
    """Routing of the reference's rows, the policy's rows, and of twins."""

    def __init__(self, bench: Bench, exact: Arm, policy: Arm) -> None:
        self._bench, self._rows = bench, len(bench.ids)
        self._deciders = [Decider(a.rule, bench.fork(a.cache), bench.k) for a in (exact, policy)]
        self._outs = [Decisions.empty(self._rows, bench.k) for _ in range(2)]
        self.counts = [Counts(self._rows) for _ in range(2)]
        self.shadow_reads = np.zeros(self._rows)
        self.prices = np.zeros(self._rows, np.float32)

    def route(self, layer: int, scores: Tensor) -> Choice:
        """Decide both halves."""
        host = scores.cpu().numpy().reshape(2, self._rows, -1)
        for half, out in enumerate(self._outs):
            prices = self.prices if half else None
            self._deciders[half].decide(layer, host[half], None, prices, out)
            self.counts[half].add(out)
        ids = np.concatenate([out.ids for out in self._outs])
        weights = np.concatenate([out.weights for out in self._outs])
        device = self._bench.device
        return Choice(
            torch.tensor(ids, device=device).clamp_min(0).long(),
            torch.tensor(weights, device=device),
        )

    def shadow(self, layer: int, scores: Tensor) -> Choice:
        """Route a twin exactly and count what it would have to read."""
        weights, ids = scores.softmax(-1).topk(self._bench.k, -1)
        resident = self._deciders[1].caches.mask(layer)
        self.shadow_reads += (~np.take_along_axis(resident, ids.cpu().numpy(), 1)).sum(1)
        return Choice(ids, weights / weights.sum(-1, keepdim=True))
