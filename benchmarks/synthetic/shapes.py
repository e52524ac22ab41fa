"""The shapes of the Qwen3.5 mixture-of-experts models and the tensors of their GGUF files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from synthetic.mix import Mix


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Numbers of a `config.json`; `full_layers` is the real model's depth.

    DeltaNet keys and values have `state_dim` dimensions, `rotary` of `head_dim` ones are rotated.
    """

    name: str
    full_layers: int
    hidden: int
    experts: int
    top_k: int
    width: int
    heads: int
    kv_heads: int = 2
    head_dim: int = 256
    rotary: int = 64
    key_heads: int = 16
    value_heads: int
    state_dim: int = 128
    vocab: int = 248_320
    conv_width: int = 4
    attention_interval: int = 4

    @property
    def inner(self) -> int:
        """Width of DeltaNet's values."""
        return self.value_heads * self.state_dim

    def is_attention(self, layer: int) -> bool:
        """Whether `layer` has full attention (every fourth does)."""
        return (layer + 1) % self.attention_interval == 0


# Qwen/Qwen3.5-35B-A3B, -122B-A10B and -397B-A17B, text_config of config.json; the same numbers
# stand in the GGUF headers that llama.cpp prints (qwen35moe.*), e.g. in ggml-org/llama.cpp#13194.
SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape(
            name="35b-a3b", full_layers=40, hidden=2048, experts=256, top_k=8, width=512,
            heads=16, value_heads=32,
        ),
        ModelShape(
            name="122b-a10b", full_layers=48, hidden=3072, experts=256, top_k=8, width=1024,
            heads=32, value_heads=64,
        ),
        ModelShape(
            name="397b-a17b", full_layers=60, hidden=4096, experts=512, top_k=10, width=1024,
            heads=32, value_heads=64,
        ),
        # Sixty layers with next to nothing in them: what is left is the cost of the loop itself.
        ModelShape(
            name="tiny60", full_layers=60, hidden=256, experts=32, top_k=4, width=64,
            heads=4, head_dim=64, rotary=16, key_heads=2, value_heads=4, state_dim=64, vocab=1024,
        ),
        # The routing of the 397B, layer for layer, over narrow experts: for hit rates.
        ModelShape(
            name="397b-narrow", full_layers=60, hidden=512, experts=512, top_k=10, width=32,
            heads=4, head_dim=64, rotary=16, key_heads=2, value_heads=4, state_dim=64, vocab=8192,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to write: `shape` with the row length last, and `gain`.

    `gain` is the standard deviation of its product with an input of unit variance.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    gain: float = 1.0


@dataclass(frozen=True, slots=True)
class Gains:
    """Gains of the projections that write to the residual stream."""

    attention: float
    delta: float
    experts: float
    shared: float


def layer_tensors(shape: ModelShape, layer: int, mix: Mix, gains: Gains) -> Iterator[Tensor]:
    """Yield the quantised matrices of a layer, named and typed as in a Q4_K_M file."""
    block, hidden = f"blk.{layer}.", shape.hidden

    def matrix(name: str, dims: tuple[int, ...], gain: float = 1.0) -> Tensor:
        return Tensor(block + name, dims, mix.kind(name, layer, dims[-1]), gain)

    if shape.is_attention(layer):
        rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        yield matrix("attn_q.weight", (2 * rows, hidden))
        yield matrix("attn_k.weight", (kv_rows, hidden))
        yield matrix("attn_v.weight", (kv_rows, hidden))
        yield matrix("attn_output.weight", (hidden, rows), gains.attention)
    else:
        channels = 2 * shape.key_heads * shape.state_dim + shape.inner
        yield matrix("attn_qkv.weight", (channels, hidden))
        yield matrix("attn_gate.weight", (shape.inner, hidden))
        yield matrix("ssm_alpha.weight", (shape.value_heads, hidden))
        yield matrix("ssm_beta.weight", (shape.value_heads, hidden))
        yield matrix("ssm_out.weight", (hidden, shape.inner), gains.delta)
    width, count = shape.width, shape.experts
    yield matrix("ffn_gate_exps.weight", (count, width, hidden))
    yield matrix("ffn_up_exps.weight", (count, width, hidden))
    yield matrix("ffn_down_exps.weight", (count, hidden, width), gains.experts)
    yield matrix("ffn_gate_shexp.weight", (width, hidden))
    yield matrix("ffn_up_shexp.weight", (width, hidden))
    yield matrix("ffn_down_shexp.weight", (hidden, width), gains.shared)
