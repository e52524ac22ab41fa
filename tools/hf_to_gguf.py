"""Write a transformers Qwen3_5MoeForCausalLM state dict as a `qwen35moe` GGUF file.

Names, metadata and layouts are those that llama.cpp reads:

- RMSNorm weights get +1, except the gated norm inside DeltaNet, which is stored as it is;
- DeltaNet value heads go from grouped (by key head) to tiled order: GGUF value head r uses key head
  r mod n_key_heads;
- `A_log` becomes `ssm_a` = -exp(A_log), the causal convolution is squeezed to [channels, width];
- the experts of a layer are one 3-D tensor per projection, or gate and up fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf_metadata import add_metadata, add_tokenizer, file_type

ARCH = "qwen35moe"

TOP_LEVEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PER_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}
ALWAYS_F32 = ("ssm_conv1d.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


def write_gguf(  # noqa: PLR0913 one call says everything about a file
    state_dict: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    path: Path,
    *,
    tokenizer: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    tensor_type: str | Callable[[str], str] = "F32",
    fused_gate_up: bool = False,
    name: str = "qwen35moe",
    license_id: str | None = None,
) -> None:
    """Write `path` from a state dict and the text config (`config.to_dict()`).

    `tokenizer` is a parsed `tokenizer.json`; without it the file says that it has no vocabulary.
    `tensor_type` is the GGML type of the matrices, or a function from GGUF tensor name to type;
    vectors, norms, routers and the convolution stay F32.
    """
    writer = gguf.GGUFWriter(path, ARCH)
    pick_type = tensor_type if callable(tensor_type) else lambda _name: tensor_type
    writer.add_name(name)
    if license_id is not None:
        writer.add_license(license_id)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_metadata(writer, config)
    writer.add_file_type(file_type(pick_type("blk.0.ffn_down_exps.weight")))
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_tokenizer(writer, tokenizer, int(config["vocab_size"]))
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for tensor_name, values in gguf_tensors(state_dict, config, fused_gate_up=fused_gate_up):
        keep = values.ndim == 1 or tensor_name.endswith(ALWAYS_F32)
        kind = gguf.GGMLQuantizationType[("F32" if keep else pick_type(tensor_name)).upper()]
        writer.add_tensor(tensor_name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(
    state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any], *, fused_gate_up: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield GGUF names and float32 arrays in the order of the state dict."""
    tied = bool(config.get("tie_word_embeddings", False))
    for source, raw in state_dict.items():
        key = source.replace("language_model.", "")
        if key == "lm_head.weight" and tied:
            continue
        target = _gguf_name(key)
        values = _transform(key, np.asarray(raw, dtype=np.float32), config)
        if target.endswith("ffn_gate_up_exps.weight") and not fused_gate_up:
            gate, up = np.split(values, 2, axis=1)
            yield target.replace("gate_up", "gate"), np.ascontiguousarray(gate)
            yield target.replace("gate_up", "up"), np.ascontiguousarray(up)
        else:
            yield target, np.ascontiguousarray(values)


def _gguf_name(key: str) -> str:
    """GGUF name of one transformers parameter; ValueError when there is none."""
    if key in TOP_LEVEL:
        return TOP_LEVEL[key]
    parts = key.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"] and parts[3] in PER_LAYER:
        return f"blk.{parts[2]}.{PER_LAYER[parts[3]]}"
    raise ValueError(f"no GGUF name for parameter {key!r}")


def _transform(key: str, values: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Bring one parameter from transformers' layout to the GGUF's."""
    if "linear_attn." in key:
        return _transform_deltanet(key.rsplit("linear_attn.", 1)[1], values, config)
    if key.endswith("norm.weight"):
        return values + 1.0
    return values.reshape(-1) if key.endswith("shared_expert_gate.weight") else values


def _transform_deltanet(key: str, values: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Re-order value heads from grouped to tiled; fold `A_log`; squeeze the convolution."""
    k_heads, v_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    v_dim = config["linear_value_head_dim"]
    qk_rows = 2 * k_heads * config["linear_key_head_dim"]

    def tiled(part: np.ndarray, head_dim: int, axis: int = 0) -> np.ndarray:
        head = np.arange(v_heads).reshape(k_heads, v_heads // k_heads).T.reshape(-1)
        rows = (head[:, None] * head_dim + np.arange(head_dim)).reshape(-1)
        return np.take(part, rows, axis=axis)

    match key:
        case "A_log":
            return tiled(-np.exp(values), 1)
        case "dt_bias" | "in_proj_a.weight" | "in_proj_b.weight":
            return tiled(values, 1)
        case "in_proj_z.weight":
            return tiled(values, v_dim)
        case "out_proj.weight":
            return tiled(values, v_dim, axis=1)
        case "in_proj_qkv.weight" | "conv1d.weight":
            flat = values.reshape(values.shape[0], values.shape[-1])
            return np.concatenate([flat[:qk_rows], tiled(flat[qk_rows:], v_dim)])
    return values
