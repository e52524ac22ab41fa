"""The CPU path that a device is compared with: a whole model in this process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fomoe.engine.experts import ResidentExperts
from fomoe.engine.forward import Forward
from fomoe.engine.local import sequence_logits
from fomoe.engine.sequences import Sequence
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.layers import DenseModel
from fomoe.model.state import Batch
from fomoe.residency import LogicalRules

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Choice:
    """A greedy token, how far its logit is above the second, and the decisions before it."""

    token: int
    margin: float
    hash: int


class _Noisy(DenseModel):
    """A model whose embeddings are off by a share of `noise`: as by another order of sums."""

    noise = 0.0

    def embed(self, batch: Batch) -> F32:
        x = super().embed(batch)
        x *= np.float32(1) + np.float32(self.noise) * self._rng.standard_normal(x.shape, np.float32)
        return x

    @cached_property
    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(0)


class CPUPath:
    """A model with every expert in memory; each text begins anew.

    `noise` is what embeddings are off by, as a share of them: what comes out otherwise then is no
    fault of anybody's.
    """

    def __init__(
        self, path: Path, *, ctx_size: int, int8: bool, kv_dtype: str = "f16", noise: float = 0.0
    ) -> None:
        file = open_gguf(path)
        self.spec = read_spec(file)
        self._chunk = min(128, ctx_size)
        model = _Noisy(file, self.spec, self._chunk, int8=int8)
        model.noise = noise
        experts = ResidentExperts(file, self.spec, self._chunk, int8=int8, threads=1)
        self._forward = Forward(model, experts, prefetch=False)
        rules = LogicalRules(capacity=self.spec.moe.n_experts)
        self._sequence = Sequence(self.spec, ctx_size, kv_dtype, rules)

    def logits(self, tokens: list[int]) -> F32:
        """Return the logits float32 [T, V] of a text."""
        self._sequence.reset()
        return sequence_logits(self._forward, self._sequence, tokens, self._chunk)

    def generate(self, prompt: list[int], count: int) -> list[Choice]:
        """Return `count` greedy tokens."""
        row = self.logits(prompt)[-1]
        self._sequence.decoding = True
        choices = [self._choice(row)]
        while len(choices) < count:
            choices.append(self._choice(self._step(choices[-1].token)))
        return choices

    def _choice(self, row: F32) -> Choice:
        second, first = np.partition(row, -2)[-2:]
        return Choice(int(row.argmax()), float(first - second), self._sequence.logical.hash)

    def _step(self, token: int) -> F32:
        sequence = self._sequence
        self._forward.step(Batch.of([(sequence.state, [token])]), (sequence,))
        sequence.tokens.append(token)
        row: F32 = self._forward.logits(np.array([0]))[0]
        return row
