"""Writes the GGUF file: metadata, vocabulary, random blocks, and the routers of a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from synthetic import routing
from synthetic.blocks import BlockPools, Repeated, quantize_q4_k
from synthetic.mix import Mix
from synthetic.routing import Drift
from synthetic.shapes import Gains, ModelShape, Tensor, layer_tensors
from synthetic.vocabulary import add_vocabulary

ARCH = "qwen35moe"
RESIDUAL = 4.0  # root mean square of the embedding
SILU_RMS = 0.596  # of silu(z), z standard normal


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that a file depends on.

    `update` is what a sublayer adds to the residual stream, as a share of the embedding. It makes
    the routers of later layers hard to foresee, and deeper layers noisier. `freq` is a file of
    expert frequencies; without it the fitted law is used.
    """

    shape: ModelShape
    layers: int
    seed: int = 0
    drift: Drift = field(default_factory=Drift)
    update: float = 0.1
    freq: Path | None = None

    def gains(self) -> Gains:
        """Return the gains that make each sublayer add `update`; routed to shared is 4 to 3."""
        size = self.update * RESIDUAL
        return Gains(
            attention=size / 0.3,  # half-open gates over values that average out over the context
            delta=size / SILU_RMS,
            experts=0.8 * size * math.sqrt(self.shape.top_k) / SILU_RMS,
            shared=0.6 * size / (0.5 * SILU_RMS),
        )


@dataclass(frozen=True, slots=True)
class Pending:
    """A tensor of a recipe whose bytes are made when they are asked for."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], Any]

    @property
    def nbytes(self) -> int:
        elements, size = gguf.GGML_QUANT_SIZES[Kind[self.kind]]
        return int(np.prod(self.shape)) // elements * size


def write_model(path: Path, recipe: Recipe) -> None:
    """Write the file; the same recipe gives the same bytes."""
    if recipe.layers < recipe.shape.attention_interval:
        raise ValueError(f"{recipe.layers} layers: at least one needs full attention, give 4 or up")
    writer = gguf.GGUFWriter(path, ARCH)
    add_metadata(writer, recipe)
    add_vocabulary(writer, recipe.shape.vocab)
    pending = list(tensors(recipe))
    for each in pending:
        dtype = np.dtype(np.float32)
        writer.add_tensor_info(each.name, each.shape, dtype, each.nbytes, raw_dtype=Kind[each.kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for each in pending:
        writer.write_tensor_data(each.make())
    writer.close()


def add_metadata(writer: gguf.GGUFWriter, recipe: Recipe) -> None:
    """Add the general and the `qwen35moe.*` keys."""
    s = recipe.shape
    writer.add_name(f"synthetic {s.name}, {recipe.layers} layers")
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q4_K_M))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(recipe.layers)
    writer.add_context_length(262_144)
    writer.add_embedding_length(s.hidden)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000_000.0)
    writer.add_rope_dimension_count(s.rotary)
    half, third = s.rotary // 2, s.rotary // 6
    writer.add_rope_dimension_sections([(half - third + 1) // 2, (half - third) // 2, third, 0])
    writer.add_expert_count(s.experts)
    writer.add_expert_used_count(s.top_k)
    writer.add_expert_feed_forward_length(s.width)
    writer.add_expert_shared_feed_forward_length(s.width)
    writer.add_full_attention_interval(s.attention_interval)
    writer.add_ssm_conv_kernel(s.conv_width)
    writer.add_ssm_state_size(s.state_dim)
    writer.add_ssm_group_count(s.key_heads)
    writer.add_ssm_time_step_rank(s.value_heads)
    writer.add_ssm_inner_size(s.inner)


def tensors(recipe: Recipe) -> Iterator[Pending]:
    """Yield every tensor in file order; random numbers are drawn as they are made."""
    s, mix = recipe.shape, Mix(recipe.layers)
    rng = np.random.default_rng(recipe.seed)
    pools = BlockPools(rng)
    yield Pending(
        "token_embd.weight", (s.vocab, s.hidden), "Q4_K", lambda: _token_embeddings(recipe)
    )
    yield _ones("output_norm.weight", s.hidden)
    output = Tensor("output.weight", (s.vocab, s.hidden), mix.kind("output.weight", 0, s.hidden))
    yield _matrix(pools, output)
    popularity = _popularity(recipe)
    for layer in range(recipe.layers):
        yield from _small(recipe, layer, popularity[layer])
        for tensor in layer_tensors(s, layer, mix, recipe.gains()):
            yield _matrix(pools, tensor)


def _small(recipe: Recipe, layer: int, popularity: routing.F64) -> Iterator[Pending]:
    """Yield the float32 tensors of a layer: norms, router, convolution, decay."""
    s, block = recipe.shape, f"blk.{layer}."
    rng = np.random.default_rng([recipe.seed, 1, layer])
    yield _ones(block + "attn_norm.weight", s.hidden)
    yield _ones(block + "post_attention_norm.weight", s.hidden)
    if s.is_attention(layer):
        yield _ones(block + "attn_q_norm.weight", s.head_dim)
        yield _ones(block + "attn_k_norm.weight", s.head_dim)
    else:
        channels = 2 * s.key_heads * s.state_dim + s.inner
        yield _values(block + "ssm_conv1d.weight", rng.normal(0, 0.5, (channels, s.conv_width)))
        # Steps of 0.03 to 0.3 and rates of 1 to 8: memories of one to some thirty tokens.
        step = np.exp(rng.uniform(math.log(0.03), math.log(0.3), s.value_heads))
        yield _values(block + "ssm_dt.bias", np.log(np.expm1(step)))
        yield _values(block + "ssm_a", -rng.uniform(1.0, 8.0, s.value_heads))
        yield _ones(block + "ssm_norm.weight", s.state_dim)
    rows = routing.router(rng, popularity, s.hidden, recipe.drift)
    yield _values(block + "ffn_gate_inp.weight", rows)
    shared = rng.normal(0, s.hidden**-0.5, s.hidden)
    yield _values(block + "ffn_gate_inp_shexp.weight", shared)


def _popularity(recipe: Recipe) -> routing.F64:
    """Return normal quantiles of popularity [layers, experts]."""
    layers, experts = recipe.layers, recipe.shape.experts
    if recipe.freq is not None:
        return routing.measured_popularity(recipe.freq, layers, experts)
    rng = np.random.default_rng([recipe.seed, 2])
    return np.stack([routing.fitted_popularity(rng, experts) for _ in range(layers)])


def _token_embeddings(recipe: Recipe) -> Repeated:
    """Return the rows of a period of ids in Q4_K, repeated over the vocabulary."""
    s = recipe.shape
    ids = min(recipe.drift.period, s.vocab)
    rng = np.random.default_rng([recipe.seed, 3])
    rows = routing.embeddings(rng, ids, s.hidden, recipe.drift)
    rows *= np.float32(RESIDUAL)
    packed = np.concatenate([quantize_q4_k(part) for part in np.array_split(rows, 16)])
    return Repeated(packed, 0, s.vocab * packed.shape[1])


def _matrix(pools: BlockPools, tensor: Tensor) -> Pending:
    std = tensor.gain * tensor.shape[-1] ** -0.5
    return Pending(
        tensor.name,
        tensor.shape,
        tensor.kind,
        lambda: pools.matrix(tensor.kind, tensor.shape, std),
    )


def _values(name: str, values: np.ndarray) -> Pending:
    return Pending(name, values.shape, "F32", lambda: values.astype(np.float32))


def _ones(name: str, size: int) -> Pending:
    return _values(name, np.ones(size))
