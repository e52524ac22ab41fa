"""Router scores and the shared expert of an MoE layer; routed experts live with the devices."""

from __future__ import annotations

from dataclasses import dataclass

from fomoe.kernels.cpu import ops
from fomoe.model.buffers import F32, Activations, Buffer, Rows
from fomoe.model.linear import Linear, Weights
from fomoe.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class MoEWeights:
    """Dense tensors of one MoE layer (norm, router, shared expert)."""

    norm: F32
    router: Linear
    shared_gate: Linear
    shared_up: Linear
    shared_down: Linear
    shared_scale: Linear

    @classmethod
    def load(cls, weights: Weights, spec: ModelSpec, layer: int) -> MoEWeights:
        """Read the layer's tensors."""
        m, p = spec.moe, f"blk.{layer}."
        return cls(
            norm=weights.vector(p + "post_attention_norm.weight", spec.hidden),
            router=weights.linear(p + "ffn_gate_inp.weight", m.n_experts, spec.hidden),
            shared_gate=weights.linear(p + "ffn_gate_shexp.weight", m.shared_width, spec.hidden),
            shared_up=weights.linear(p + "ffn_up_shexp.weight", m.shared_width, spec.hidden),
            shared_down=weights.linear(p + "ffn_down_shexp.weight", spec.hidden, m.shared_width),
            shared_scale=weights.linear(p + "ffn_gate_inp_shexp.weight", 1, spec.hidden),
        )


class MoEBlock:
    """Router and shared expert of every layer, over shared work buffers."""

    def __init__(self, spec: ModelSpec, max_tokens: int, *, int8: bool) -> None:
        m = spec.moe
        self._eps = spec.eps
        self._input = Activations(max_tokens, spec.hidden, int8=int8)
        self._scores = Buffer(max_tokens, m.n_experts)
        self._ahead_input = Buffer(max_tokens, spec.hidden)
        self._ahead_scores = Buffer(max_tokens, m.n_experts)
        self._gate = Buffer(max_tokens, m.shared_width)
        self._up = Buffer(max_tokens, m.shared_width)
        self._inner = Activations(max_tokens, m.shared_width, int8=int8)
        self._scale = Buffer(max_tokens, 1)
        self._shared = Buffer(max_tokens, spec.hidden)

    def scores(self, w: MoEWeights, x: F32) -> tuple[Rows, F32]:
        """Return the experts' input and the router scores float32 [T, E] for the residual `x`."""
        h = self._input.at(len(x))
        ops.rms_norm(x, w.norm, self._eps, h.x)
        scores = w.router.exact(h.x, self._scores.at(len(x)))
        return h.quantize(), scores

    def look_ahead(self, w: MoEWeights, x: F32) -> F32:
        """Return the scores that a later layer's router gives to this layer's residual `x`."""
        h = self._ahead_input.at(len(x))
        ops.rms_norm(x, w.norm, self._eps, h)
        return w.router.exact(h, self._ahead_scores.at(len(x)))

    def shared(self, w: MoEWeights, h: Rows) -> F32:
        """Return the shared expert's output times its sigmoid gate, float32 [T, D]."""
        t = len(h.x)
        gate, up = w.shared_gate(h, self._gate.at(t)), w.shared_up(h, self._up.at(t))
        inner = self._inner.at(t)
        ops.silu_mul(gate, up, inner.x)
        out = w.shared_down(inner.quantize(), self._shared.at(t))
        scale = w.shared_scale.exact(h.x, self._scale.at(t))
        ops.scale_sigmoid(out, scale.reshape(t))
        return out
