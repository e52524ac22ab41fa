"""Router scores and the shared expert of an MoE layer; routed experts live with the devices."""

from __future__ import annotations

from dataclasses import dataclass

from fomoe.kernels.cpu import layers
from fomoe.model.buffers import F32, Buffer
from fomoe.model.linear import Linear, Weights, operands
from fomoe.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class MoEWeights:
    """Dense tensors of one MoE layer; all but norm and router are the shared expert's."""

    norm: F32
    router: Linear
    gate: Linear
    up: Linear
    down: Linear
    scale: Linear

    @classmethod
    def load(cls, weights: Weights, spec: ModelSpec, layer: int) -> MoEWeights:
        """Read the layer's tensors."""
        m, p = spec.moe, f"blk.{layer}."
        return cls(
            norm=weights.vector(p + "post_attention_norm.weight", spec.hidden),
            router=weights.linear(p + "ffn_gate_inp.weight", m.n_experts, spec.hidden),
            gate=weights.linear(p + "ffn_gate_shexp.weight", m.shared_width, spec.hidden),
            up=weights.linear(p + "ffn_up_shexp.weight", m.shared_width, spec.hidden),
            down=weights.linear(p + "ffn_down_shexp.weight", spec.hidden, m.shared_width),
            scale=weights.linear(p + "ffn_gate_inp_shexp.weight", 1, spec.hidden),
        )


class MoEBlock:
    """Router and shared expert of every layer, over work buffers that the layers share."""

    def __init__(
        self, weights: tuple[MoEWeights, ...], spec: ModelSpec, max_tokens: int, *, int8: bool
    ) -> None:
        self._layers = [layers.MoeDense(spec.eps, int8, operands(w)) for w in weights]
        self._input = Buffer(max_tokens, spec.hidden)
        self._scores = Buffer(max_tokens, spec.moe.n_experts)
        self._ahead_input = Buffer(max_tokens, spec.hidden)
        self._ahead_scores = Buffer(max_tokens, spec.moe.n_experts)
        self._shared = Buffer(max_tokens, spec.hidden)

    def scores(self, layer: int, x: F32) -> tuple[F32, F32]:
        """Return the experts' input [T, D] and the router scores float32 [T, E] for residual x."""
        h, scores = self._input.at(len(x)), self._scores.at(len(x))
        self._layers[layer].route(x, h, scores)
        return h, scores

    def look_ahead(self, layer: int, x: F32) -> F32:
        """Return the scores that a later layer's router gives to this layer's residual `x`."""
        scores = self._ahead_scores.at(len(x))
        self._layers[layer].route(x, self._ahead_input.at(len(x)), scores)
        return scores

    def shared(self, layer: int, h: F32) -> F32:
        """Return the shared expert's output times its sigmoid gate, float32 [T, D]."""
        out = self._shared.at(len(h))
        self._layers[layer].shared(h, out)
        return out
