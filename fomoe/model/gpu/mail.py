"""What passes of a device bring from the host and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fomoe.kernels.gpu.step import picks
from fomoe.model.gpu.decode import Desk
from fomoe.model.gpu.options import HostOptions
from fomoe.model.gpu.transfer import Mirror


@dataclass(frozen=True, slots=True)
class Mail:
    """What passes bring from the host and back.

    Attributes:
        step: the step block, STEP [1].
        tokens: int32 [T].
        scores: float32 [T, E].
        picks: `step.picks` [L], of one token.
        ids: int32 [L, T, K], of a prompt.
        weights: float32 [T, K], of a prompt's layer.
        wave: uint64 [3, E], where the experts of a prompt's wave lie; zeros for all others.
        ahead: float32 [1, E], scores of the next layer's router.
        foreseen: the same, by the residual stream that goes into that layer.
        late: uint32 [1], bit i: the bytes of a token's i-th expert may be on their way.
        input: float32 [1, D], what a token's experts see.
    """

    step: Mirror
    tokens: Mirror
    scores: Mirror
    picks: Mirror
    ids: Mirror
    weights: Mirror
    wave: Mirror
    ahead: Mirror
    input: Mirror
    foreseen: Mirror
    late: Mirror

    @classmethod
    def of(cls, desk: Desk, step: Mirror, options: HostOptions) -> Mail:
        """Take the memory on both sides."""
        gpu, moe, tokens = desk.gpu, desk.spec.moe, options.max_tokens
        n_layers = len(options.layers)
        prompt = tokens if tokens > 1 and options.has_experts else 0
        return cls(
            step=step,
            tokens=Mirror(gpu, (tokens,), np.int32),
            scores=Mirror(gpu, (tokens, moe.n_experts), np.float32, desk.work.moe.scores),
            picks=Mirror(gpu, (n_layers,), picks(moe.top_k)),
            ids=Mirror(gpu, (n_layers, max(1, prompt), moe.top_k), np.int32),
            weights=Mirror(gpu, (max(1, prompt), moe.top_k), np.float32, desk.work.weights),
            wave=Mirror(gpu, (3, moe.n_experts), np.uint64),
            ahead=Mirror(gpu, (1, moe.n_experts), np.float32),
            input=Mirror(gpu, (1, desk.spec.hidden), np.float32, desk.work.moe.h.x),
            foreseen=Mirror(gpu, (1, moe.n_experts), np.float32),
            late=Mirror(gpu, (1,), np.uint32, desk.work.moe.late),
        )
