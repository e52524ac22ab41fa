"""Gated DeltaNet layer (Qwen3.5): convolution, delta rule step by step, gated norm."""

from __future__ import annotations

from dataclasses import dataclass

from fomoe.kernels.cpu import ops
from fomoe.model.buffers import F32, Activations, Buffer
from fomoe.model.linear import Linear, Weights
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


class DeltaBlock:
    """x += W_o gated_norm(delta(conv(W_qkv norm(x))), z); work buffers are shared by all layers."""

    def __init__(self, spec: ModelSpec, max_tokens: int, *, int8: bool) -> None:
        d = self._spec = spec.delta
        self._eps = spec.eps
        self._input = Activations(max_tokens, spec.hidden, int8=int8)
        self._qkv = Buffer(max_tokens, d.channels)
        self._convolved = Buffer(max_tokens, d.channels)
        self._z = Buffer(max_tokens, d.inner)
        self._alpha = Buffer(max_tokens, d.n_v_heads)
        self._beta = Buffer(max_tokens, d.n_v_heads)
        self._recurrent = Buffer(max_tokens, d.inner)
        self._normed = Activations(max_tokens, d.inner, int8=int8)
        self._out = Buffer(max_tokens, spec.hidden)

    def __call__(self, w: DeltaWeights, x: F32, batch: Batch, layer: int) -> None:
        """Add the layer's output to the residual stream `x` float32 [T, D] in place."""
        t, d = batch.size, self._spec
        h = self._input.at(t)
        ops.rms_norm(x, w.norm, self._eps, h.x)
        h.quantize()
        qkv, z = w.qkv(h, self._qkv.at(t)), w.z(h, self._z.at(t))
        alpha, beta = w.alpha(h, self._alpha.at(t)), w.beta(h, self._beta.at(t))
        convolved, recurrent = self._convolved.at(t), self._recurrent.at(t)
        for run in batch.runs:
            state = run.state.layers[layer]
            assert isinstance(state, DeltaState)
            rows = slice(run.start, run.stop)
            ops.conv_silu(qkv[rows], w.conv, state.conv, convolved[rows])
            ops.deltanet(
                convolved[rows], alpha[rows], beta[rows], w.decay, w.dt_bias,
                d.n_k_heads, d.n_v_heads, d.key_dim, d.value_dim, self._eps,
                state.memory, recurrent[rows],
            )  # fmt: skip
        normed = self._normed.at(t)
        ops.gated_rms_norm(recurrent, z, w.out_norm, self._eps, normed.x)
        ops.add(x, w.output(normed.quantize(), self._out.at(t)))
