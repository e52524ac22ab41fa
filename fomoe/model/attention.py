"""Gated full attention with grouped heads and partial rotary embedding (Qwen3.5)."""

from __future__ import annotations

from dataclasses import dataclass

from fomoe.kernels.cpu import layers
from fomoe.model.buffers import F32
from fomoe.model.linear import Linear, Weights, operands
from fomoe.model.spec import ModelSpec
from fomoe.model.state import Batch, KVCache


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Tensors of one attention layer; `q` yields query and output gate interleaved per head."""

    norm: F32
    q: Linear
    k: Linear
    v: Linear
    q_norm: F32
    k_norm: F32
    output: Linear

    @classmethod
    def load(cls, weights: Weights, spec: ModelSpec, layer: int) -> AttentionWeights:
        """Read the layer's tensors."""
        a, p = spec.attention, f"blk.{layer}."
        kv_rows = a.n_kv_heads * a.head_dim
        return cls(
            norm=weights.vector(p + "attn_norm.weight", spec.hidden),
            q=weights.linear(p + "attn_q.weight", 2 * a.n_heads * a.head_dim, spec.hidden),
            k=weights.linear(p + "attn_k.weight", kv_rows, spec.hidden),
            v=weights.linear(p + "attn_v.weight", kv_rows, spec.hidden),
            q_norm=weights.vector(p + "attn_q_norm.weight", a.head_dim),
            k_norm=weights.vector(p + "attn_k_norm.weight", a.head_dim),
            output=weights.linear(p + "attn_output.weight", spec.hidden, a.n_heads * a.head_dim),
        )


class AttentionLayer:
    """x += W_o (attention(norm(x)) * sigmoid(gate)) for one layer."""

    def __init__(self, w: AttentionWeights, spec: ModelSpec, index: int, *, int8: bool) -> None:
        a = spec.attention
        self._index = index
        self._mixer = layers.AttentionMixer(
            (a.n_heads, a.n_kv_heads, a.head_dim), a.rope_dims, a.rope_base, spec.eps, int8,
            operands(w),
        )  # fmt: skip

    def __call__(self, x: F32, batch: Batch) -> None:
        """Add the layer's attention to the residual stream `x` float32 [T, D] in place."""
        for run in batch.runs:
            cache = run.state.layers[self._index]
            assert isinstance(cache, KVCache)
            self._mixer.run(run.rows_of(x), cache.k, cache.v, run.position)
