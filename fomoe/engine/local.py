"""The whole model in one process, without actors: for tools and tests of exactness."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fomoe.engine.experts import ResidentExperts
from fomoe.engine.forward import Forward
from fomoe.engine.loop import LayerLoop
from fomoe.engine.sequences import Sequence
from fomoe.gguf.reader import open_gguf
from fomoe.model.archs import read_spec
from fomoe.model.buffers import F32
from fomoe.model.layers import HEAD_ROWS, DenseModel
from fomoe.model.state import Batch
from fomoe.residency import LogicalRules


def local_logits(
    path: Path | str,
    tokens: list[int],
    *,
    kv_dtype: str = "f16",
    activations: str = "int8",
    chunk: int = 128,
    threads: int = 1,
) -> F32:
    """Return the logits float32 [T, V] of a token sequence, every expert held in memory.

    `chunk` tokens go through the layers at once; the result does not depend on it to the bit.
    """
    file = open_gguf(Path(path))
    spec = read_spec(file)
    int8 = activations == "int8"
    model = DenseModel(file, spec, chunk, int8=int8)
    experts = ResidentExperts(file, spec, chunk, int8=int8, threads=threads)
    forward = Forward(model, experts, prefetch=False)
    sequence = Sequence(spec, len(tokens), kv_dtype, LogicalRules(capacity=spec.moe.n_experts))
    return sequence_logits(forward, sequence, tokens, chunk)


def sequence_logits(forward: LayerLoop, sequence: Sequence, tokens: list[int], chunk: int) -> F32:
    """Feed `tokens` to an empty sequence in chunks; returns float32 [T, V]."""
    out = np.empty((len(tokens), forward.spec.vocab), np.float32)
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        forward.step(Batch.of([(sequence.state, part)]), (sequence,))
        sequence.tokens.extend(part)
        for row in range(0, len(part), HEAD_ROWS):
            rows = np.arange(row, min(row + HEAD_ROWS, len(part)))
            out[start + rows] = forward.logits(rows)
    return out
