"""The lab model's shape: the smallest one whose routing behaves like a large model's."""

from __future__ import annotations

from transformers import Qwen3_5MoeTextConfig

ROTARY_PAIRS_PER_AXIS = (6, 5, 5)


def lab_config(vocab_size: int, *, toy: bool = False) -> Qwen3_5MoeTextConfig:
    """12 layers (9 DeltaNet, 3 full attention), 128 experts, 8 per token; `toy` is for a CPU."""
    width = 64 if toy else 512
    return Qwen3_5MoeTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=4 if toy else 12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        linear_num_key_heads=2 if toy else 4,
        linear_num_value_heads=4 if toy else 8,
        linear_key_head_dim=32 if toy else 64,
        linear_value_head_dim=32 if toy else 64,
        num_experts=16 if toy else 128,
        num_experts_per_tok=4 if toy else 8,
        moe_intermediate_size=32 if toy else 128,
        shared_expert_intermediate_size=64 if toy else 512,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.02,
        attn_implementation="sdpa",
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 100_000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": list(ROTARY_PAIRS_PER_AXIS),
            "mrope_interleaved": True,
        },
    )
