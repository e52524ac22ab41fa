"""What a model is: sizes and constants, read from GGUF metadata once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["delta", "attention"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Gated full attention: heads, grouped key/value heads, partial rotary."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope_dims: int
    rope_base: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaSpec:
    """Gated DeltaNet: `n_v_heads` states of [key_dim, value_dim] and a causal convolution."""

    n_k_heads: int
    n_v_heads: int
    key_dim: int
    value_dim: int
    conv_width: int

    @property
    def channels(self) -> int:
        """Width of the convolution: queries, keys and values."""
        return 2 * self.n_k_heads * self.key_dim + self.n_v_heads * self.value_dim

    @property
    def inner(self) -> int:
        """Width of the output before its projection."""
        return self.n_v_heads * self.value_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """Routed experts and one shared expert."""

    n_experts: int
    top_k: int
    expert_width: int
    shared_width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything the engine must know about a model besides its weights."""

    architecture: str
    name: str
    hidden: int
    vocab: int
    ctx_train: int
    eps: float
    layers: tuple[LayerKind, ...]
    attention: AttentionSpec
    delta: DeltaSpec
    moe: MoESpec

    @property
    def n_layers(self) -> int:
        """Number of layers that run (a draft head is not counted)."""
        return len(self.layers)
