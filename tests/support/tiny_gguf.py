"""Random `qwen35moe` GGUF files for tests, in well under a second and without a framework."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind
from support.random_blocks import random_matrix
from support.tiny_tokenizer import add_tokenizer

# As in llama.cpp's mix: part of the layers keep `down` in a finer type.
MIXES = {
    "Q4_K_M": ("Q4_K", "Q6_K"),
    "Q5_K_M": ("Q5_K", "Q6_K"),
    "Q2_K_S": ("Q2_K", "Q3_K"),
    "Q4_K_F16": ("Q4_K", "F16"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySpec:
    """Shape and types of a random model.

    `quant` is the type of the routed experts, or a mix of `MIXES` (gate and up in its first type,
    down in its first on odd layers and its second on even ones). `dense` is the type of every
    other matrix; norms, routers and convolutions are F32. `mtp` appends a multi-token-prediction
    block, which a plain forward pass must skip. `shard_tensors` > 0 splits the file.
    """

    layers: int = 4
    experts: int = 32
    top_k: int = 4
    hidden: int = 256
    expert_width: int = 256
    quant: str = "Q4_K"
    dense: str = "F16"
    vocab: int = 512
    attention_interval: int = 4
    context: int = 4096
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rotary: int = 16
    key_heads: int = 2
    value_heads: int = 4
    state_dim: int = 32
    tied: bool = False
    fused: bool = False
    mtp: bool = False
    shard_tensors: int = 0

    def expert_kinds(self, layer: int) -> tuple[Kind, Kind]:
        """The types of (gate and up, down) in `layer`."""
        coarse, fine = MIXES.get(self.quant, (self.quant, self.quant))
        return Kind[coarse], Kind[coarse if layer % 2 else fine]


def write_tiny(path: Path | str, *, seed: int = 0, **shape: Any) -> Path:
    """Write a random model; `shape` are fields of `TinySpec`. The same arguments, the same bytes.

    Returns the file to open: `path`, or the first shard (`<stem>-00001-of-0000N.gguf`).
    """
    spec = TinySpec(**shape)
    path = Path(path)
    writer = gguf.GGUFWriter(path, "qwen35moe", split_max_tensors=spec.shard_tensors)
    _add_metadata(writer, spec)
    add_tokenizer(writer, spec.vocab)
    for name, values, kind in _tensors(spec, np.random.default_rng(seed)):
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else next(iter(path.parent.glob(f"{path.stem}-00001-of-*.gguf")))


def _add_metadata(writer: gguf.GGUFWriter, spec: TinySpec) -> None:
    """Add the general and the `qwen35moe.*` keys."""
    writer.add_name("tiny random qwen35moe")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(spec.vocab)
    writer.add_block_count(spec.layers + spec.mtp)
    if spec.mtp:
        writer.add_uint32("qwen35moe.nextn_predict_layers", 1)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.hidden)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000_000.0)
    writer.add_rope_dimension_count(spec.rotary)
    half = spec.rotary // 2
    writer.add_rope_dimension_sections([half - 2 * (half // 3), half // 3, half // 3, 0])
    writer.add_expert_count(spec.experts)
    writer.add_expert_used_count(spec.top_k)
    writer.add_expert_feed_forward_length(spec.expert_width)
    writer.add_expert_shared_feed_forward_length(spec.expert_width)
    writer.add_full_attention_interval(spec.attention_interval)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(spec.state_dim)
    writer.add_ssm_group_count(spec.key_heads)
    writer.add_ssm_time_step_rank(spec.value_heads)
    writer.add_ssm_inner_size(spec.value_heads * spec.state_dim)


def _tensors(
    spec: TinySpec, rng: np.random.Generator
) -> Iterator[tuple[str, npt.NDArray[Any], Kind]]:
    """Name, stored values and type of every tensor, in file order."""
    dense = Kind[spec.dense]
    spread = 2.5 * spec.hidden**-0.5 if spec.tied else 1.0
    yield "token_embd.weight", random_matrix(rng, (spec.vocab, spec.hidden), spread, dense), dense
    yield _norm(rng, "output_norm", spec.hidden)
    if not spec.tied:
        yield _matrix(rng, "output", (spec.vocab, spec.hidden), dense, gain=2.5)
    for layer in range(spec.layers + spec.mtp):
        mtp = layer == spec.layers
        block = f"blk.{layer}"
        yield _norm(rng, f"{block}.attn_norm", spec.hidden)
        if mtp or (layer + 1) % spec.attention_interval == 0:
            yield from _attention(spec, rng, block)
        else:
            yield from _delta_net(spec, rng, block)
        yield _norm(rng, f"{block}.post_attention_norm", spec.hidden)
        yield from _experts(spec, rng, layer)
        if mtp:
            yield _matrix(rng, f"{block}.nextn.eh_proj", (spec.hidden, 2 * spec.hidden), dense)
            for name in ("enorm", "hnorm", "shared_head_norm"):
                yield _norm(rng, f"{block}.nextn.{name}", spec.hidden)


def _attention(
    spec: TinySpec, rng: np.random.Generator, block: str
) -> Iterator[tuple[str, npt.NDArray[Any], Kind]]:
    """Full attention: query with gate, key, value, their norms and the output."""
    dense, kv_rows = Kind[spec.dense], spec.kv_heads * spec.head_dim
    rows = spec.heads * spec.head_dim
    yield _matrix(rng, f"{block}.attn_q", (2 * rows, spec.hidden), dense)
    yield _matrix(rng, f"{block}.attn_k", (kv_rows, spec.hidden), dense)
    yield _matrix(rng, f"{block}.attn_v", (kv_rows, spec.hidden), dense)
    yield _norm(rng, f"{block}.attn_q_norm", spec.head_dim)
    yield _norm(rng, f"{block}.attn_k_norm", spec.head_dim)
    yield _matrix(rng, f"{block}.attn_output", (spec.hidden, rows), dense)


def _delta_net(
    spec: TinySpec, rng: np.random.Generator, block: str
) -> Iterator[tuple[str, npt.NDArray[Any], Kind]]:
    """Gated DeltaNet: projections, convolution, decay and gated norm."""
    dense, heads = Kind[spec.dense], spec.value_heads
    inner = heads * spec.state_dim
    channels = 2 * spec.key_heads * spec.state_dim + inner
    yield _matrix(rng, f"{block}.attn_qkv", (channels, spec.hidden), dense)
    yield _matrix(rng, f"{block}.attn_gate", (inner, spec.hidden), dense)
    yield _matrix(rng, f"{block}.ssm_alpha", (heads, spec.hidden), dense)
    yield _matrix(rng, f"{block}.ssm_beta", (heads, spec.hidden), dense)
    yield _matrix(rng, f"{block}.ssm_conv1d", (channels, 4), Kind.F32)
    # Steps of 0.03 to 0.3 and rates of 1 to 8: memories of one to some thirty tokens.
    step = np.exp(rng.uniform(math.log(0.03), math.log(0.3), heads))
    yield _vector(f"{block}.ssm_dt.bias", np.log(np.expm1(step)))
    yield _vector(f"{block}.ssm_a", -rng.uniform(1.0, 8.0, heads))
    yield _norm(rng, f"{block}.ssm_norm", spec.state_dim)
    yield _matrix(rng, f"{block}.ssm_out", (spec.hidden, inner), dense)


def _experts(
    spec: TinySpec, rng: np.random.Generator, layer: int
) -> Iterator[tuple[str, npt.NDArray[Any], Kind]]:
    """Router, routed experts and shared expert of one layer."""
    dense, block = Kind[spec.dense], f"blk.{layer}"
    count, width, hidden = spec.experts, spec.expert_width, spec.hidden
    inner, outer = spec.expert_kinds(layer)
    yield _matrix(rng, f"{block}.ffn_gate_inp", (count, hidden), Kind.F32, gain=1.5)
    if spec.fused:
        yield _matrix(rng, f"{block}.ffn_gate_up_exps", (count, 2 * width, hidden), inner)
    else:
        yield _matrix(rng, f"{block}.ffn_gate_exps", (count, width, hidden), inner)
        yield _matrix(rng, f"{block}.ffn_up_exps", (count, width, hidden), inner)
    yield _matrix(rng, f"{block}.ffn_down_exps", (count, hidden, width), outer, gain=2.0)
    yield _vector(f"{block}.ffn_gate_inp_shexp.weight", rng.normal(0, hidden**-0.5, hidden))
    yield _matrix(rng, f"{block}.ffn_gate_shexp", (width, hidden), dense)
    yield _matrix(rng, f"{block}.ffn_up_shexp", (width, hidden), dense)
    yield _matrix(rng, f"{block}.ffn_down_shexp", (hidden, width), dense, gain=2.0)


def _matrix(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], kind: Kind, gain: float = 1.0
) -> tuple[str, npt.NDArray[Any], Kind]:
    """A matrix whose product with unit-variance input has standard deviation `gain`."""
    return f"{name}.weight", random_matrix(rng, shape, gain * shape[-1] ** -0.5, kind), kind


def _norm(rng: np.random.Generator, name: str, size: int) -> tuple[str, npt.NDArray[Any], Kind]:
    """Norm weights around one, all different."""
    return _vector(f"{name}.weight", rng.normal(1.0, 0.2, size))


def _vector(name: str, values: npt.NDArray[np.float64]) -> tuple[str, npt.NDArray[Any], Kind]:
    """A float32 vector."""
    return name, values.astype(np.float32), Kind.F32
