"""Metadata of a `qwen35moe` GGUF: model keys, tokenizer, file type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf

DEFAULT_MROPE_SECTIONS = (11, 11, 10)
INTEGER_KEYS = {
    "vocab_size": "vocab_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "head_count": "num_attention_heads",
    "head_count_kv": "num_key_value_heads",
    "key_length": "head_dim",
    "value_length": "head_dim",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "ssm_conv_kernel": "linear_conv_kernel_dim",
    "ssm_state_size": "linear_key_head_dim",
    "ssm_group_count": "linear_num_key_heads",
    "ssm_time_step_rank": "linear_num_value_heads",
}


def add_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """Add the `qwen35moe.*` keys."""
    rope = dict(config.get("rope_parameters") or {})
    fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.25))
    sections = [int(n) for n in rope.get("mrope_section", DEFAULT_MROPE_SECTIONS)]
    for key, source in INTEGER_KEYS.items():
        getattr(writer, f"add_{key}")(int(config[source]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000_000.0)))
    writer.add_rope_dimension_count(int(config["head_dim"] * fraction))
    writer.add_rope_dimension_sections((sections + [0] * 4)[:4])
    writer.add_full_attention_interval(list(config["layer_types"]).index("full_attention") + 1)
    writer.add_ssm_inner_size(config["linear_num_value_heads"] * config["linear_value_head_dim"])


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Mapping[str, Any], vocab_size: int) -> None:
    """Add a byte-level BPE vocabulary; ids without a token become unused padding."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * vocab_size
    for text, index in tokenizer["model"]["vocab"].items():
        tokens[index], kinds[index] = text, gguf.TokenType.NORMAL
    for added in tokenizer.get("added_tokens", []):
        special = bool(added["special"])
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_add_bos_token(False)
    if "<|im_end|>" in tokens:
        writer.add_eos_token_id(tokens.index("<|im_end|>"))
    if "<|endoftext|>" in tokens:
        writer.add_pad_token_id(tokens.index("<|endoftext|>"))


def file_type(expert_type: str) -> int:
    """`general.file_type` for the type that the experts have."""
    names = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}
    return int(gguf.LlamaFileType[names.get(expert_type.upper(), f"MOSTLY_{expert_type.upper()}")])
