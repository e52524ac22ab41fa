"""Gated full attention with grouped heads and partial rotary embedding (Qwen3.5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fomoe.kernels.cpu import ops
from fomoe.model.buffers import F32, Activations, Buffer
from fomoe.model.linear import Linear, Weights
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


class AttentionBlock:
    """x += W_o (attention(norm(x)) * sigmoid(gate)); work buffers are shared by all layers."""

    def __init__(self, spec: ModelSpec, max_tokens: int, *, int8: bool) -> None:
        a = self._spec = spec.attention
        self._eps = spec.eps
        self._input = Activations(max_tokens, spec.hidden, int8=int8)
        self._q_and_gate = Buffer(max_tokens, a.n_heads, 2, a.head_dim)
        self._q = Buffer(max_tokens, a.n_heads, a.head_dim)
        self._gate = Buffer(max_tokens, a.n_heads * a.head_dim)
        self._k = Buffer(max_tokens, a.n_kv_heads, a.head_dim)
        self._v = Buffer(max_tokens, a.n_kv_heads, a.head_dim)
        self._mixed = Activations(max_tokens, a.n_heads * a.head_dim, int8=int8)
        self._out = Buffer(max_tokens, spec.hidden)

    def __call__(self, w: AttentionWeights, x: F32, batch: Batch, layer: int) -> None:
        """Add the layer's attention to the residual stream `x` float32 [T, D] in place."""
        t, a = batch.size, self._spec
        h = self._input.at(t)
        ops.rms_norm(x, w.norm, self._eps, h.x)
        h.quantize()
        q_and_gate, q, k, v = (b.at(t) for b in (self._q_and_gate, self._q, self._k, self._v))
        w.q(h, q_and_gate.reshape(t, -1))
        w.k(h, k.reshape(t, -1))
        w.v(h, v.reshape(t, -1))
        gate = self._gate.at(t)
        np.copyto(q, q_and_gate[:, :, 0])
        np.copyto(gate.reshape(q.shape), q_and_gate[:, :, 1])
        ops.head_rms_norm(q, w.q_norm, self._eps)
        ops.head_rms_norm(k, w.k_norm, self._eps)
        ops.rope(q, batch.positions, a.rope_dims, a.rope_base)
        ops.rope(k, batch.positions, a.rope_dims, a.rope_base)
        mixed = self._mixed.at(t)
        per_head = mixed.x.reshape(q.shape)
        for run in batch.runs:
            cache = run.state.layers[layer]
            assert isinstance(cache, KVCache)
            rows = slice(run.start, run.stop)
            ops.kv_store(k[rows], v[rows], cache.k, cache.v, run.position)
            ops.attention(q[rows], cache.k, cache.v, run.position, per_head[rows])
        ops.sigmoid_gate(mixed.x, gate)
        ops.add(x, w.output(mixed.quantize(), self._out.at(t)))
