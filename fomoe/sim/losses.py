"""What a choice of experts loses against the exact router's, by the router's own probabilities.

p is a row's softmax over all E experts, S the exact top-k, T what runs, P_X the sum of p over X,
w_e = p_e / P_S the exact weights, v_e those that are used (0 outside T):

- lost mass     1 - P_T / P_S: less than the share of S left out where substitutes bring mass back
- left out      sum of w_e over S without T, whatever stands in for it
- lost squares  sum of w_e^2 over S without T: the damage of leaving experts out, if outputs are
                orthogonal and of one norm
- distance      sum of (w_e - v_e)^2 over S and T: the same with substitutes and weights counted
- router KL     -ln(P_T / P_S), nats: KL(p|T, p) - KL(p|S, p), where p|X is p renormalised over X
                and KL(p|X, p) = -ln P_X. 0 for exact routing, never negative.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.sim import _sim

LOSSES = ("lost_mass", "left_out", "lost_squares", "distance", "router_kl")


def losses_of(
    ids: npt.NDArray[np.int32],
    p: npt.NDArray[np.float32],
    run: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float32],
) -> npt.NDArray[np.float64]:
    """Return `LOSSES` of each row, float64 [N, 5].

    Args:
        ids: int32 [N, C], candidates, best first.
        p: float32 [N, C], their probabilities.
        run: int32 [N, k], what runs, -1 for what is dropped; k <= C. The exact top-k are the
            first k candidates.
        weights: float32 [N, k], with which weights.
    """
    out = np.empty((len(ids), len(LOSSES)))
    _sim.losses(ids, p, run, weights, out)
    return out


def reference_losses(
    ids: npt.NDArray[np.int32],
    p: npt.NDArray[np.float32],
    run: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float32],
) -> npt.NDArray[np.float64]:
    """Return the same from the formulas; the oracle in tests."""
    k, out = run.shape[1], []
    for row_ids, row_p, row_run, row_weights in zip(
        ids.tolist(), p.tolist(), run.tolist(), weights.tolist(), strict=True
    ):
        probability = dict(zip(row_ids, row_p, strict=True))
        exact = set(row_ids[:k])
        p_s = sum(probability[e] for e in exact)
        v = {e: w for e, w in zip(row_run, row_weights, strict=True) if e >= 0}
        w = {e: probability[e] / p_s for e in exact}
        p_t = sum(probability.get(e, 0.0) for e in v)
        left_out = sum(w[e] for e in exact - v.keys())
        squares = sum(w[e] ** 2 for e in exact - v.keys())
        distance = sum((w.get(e, 0.0) - v.get(e, 0.0)) ** 2 for e in exact | v.keys())
        out.append((1 - p_t / p_s, left_out, squares, distance, -np.log(p_t / p_s)))
    return np.array(out).reshape(len(ids), len(LOSSES))
