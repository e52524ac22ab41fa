"""Gated DeltaNet layer (Qwen3.5): convolution, delta rule step by step, gated norm."""

from __future__ import annotations

from dataclasses import dataclass

from fomoe.kernels.cpu import layers
from fomoe.model.buffers import F32
from fomoe.model.linear import Linear, Weights, operands
from fomoe.model.spec import ModelSpec
from fomoe.model.state import Batch, DeltaState


@dataclass(frozen=True, slots=True)
class DeltaWeights:
    """Tensors of one DeltaNet layer; value heads are tiled: head r uses key head r mod n."""

    norm: F32
    qkv: Linear
    z: Linear
    alpha: Linear
    beta: Linear
    conv: F32
    decay: F32
    dt_bias: F32
    out_norm: F32
    output: Linear

    @classmethod
    def load(cls, weights: Weights, spec: ModelSpec, layer: int) -> DeltaWeights:
        """Read the layer's tensors."""
        d, p = spec.delta, f"blk.{layer}."
        return cls(
            norm=weights.vector(p + "attn_norm.weight", spec.hidden),
            qkv=weights.linear(p + "attn_qkv.weight", d.channels, spec.hidden),
            z=weights.linear(p + "attn_gate.weight", d.inner, spec.hidden),
            alpha=weights.linear(p + "ssm_alpha.weight", d.n_v_heads, spec.hidden),
            beta=weights.linear(p + "ssm_beta.weight", d.n_v_heads, spec.hidden),
            conv=weights.matrix(p + "ssm_conv1d.weight", d.channels, d.conv_width),
            decay=weights.vector(p + "ssm_a", d.n_v_heads),
            dt_bias=weights.vector(p + "ssm_dt.bias", d.n_v_heads),
            out_norm=weights.vector(p + "ssm_norm.weight", d.value_dim),
            output=weights.linear(p + "ssm_out.weight", spec.hidden, d.inner),
        )


class DeltaLayer:
    """x += W_o gated_norm(delta(conv(W_qkv norm(x))), z) for one layer."""

    def __init__(self, w: DeltaWeights, spec: ModelSpec, index: int, *, int8: bool) -> None:
        d = spec.delta
        self._index = index
        self._mixer = layers.DeltaMixer(
            (d.n_k_heads, d.n_v_heads, d.key_dim, d.value_dim), spec.eps, int8, operands(w)
        )

    def __call__(self, x: F32, batch: Batch) -> None:
        """Add the layer's output to the residual stream `x` float32 [T, D] in place."""
        for run in batch.runs:
            state = run.state.layers[self._index]
            assert isinstance(state, DeltaState)
            self._mixer.run(run.rows_of(x), state.conv, state.memory)
