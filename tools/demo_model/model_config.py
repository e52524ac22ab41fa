"""The demo model's shape: a Qwen3.5-MoE small enough to bundle, with many experts to stream."""

from __future__ import annotations

from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

ROTARY_PAIRS_PER_AXIS = (6, 5, 5)


def demo_config(vocab_size: int) -> Qwen3_5MoeTextConfig:
    """The bundled model: 8 layers (6 DeltaNet, 2 full attention), 96 experts, 6 per token."""
    return Qwen3_5MoeTextConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=96,
        num_experts_per_tok=6,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=256,
        max_position_embeddings=4096,
        **_common(32),
    )


def tiny_config(vocab_size: int) -> Qwen3_5MoeTextConfig:
    """A toy of the same kind for dry runs on a CPU."""
    return Qwen3_5MoeTextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        max_position_embeddings=1024,
        **_common(32),
    )


def new_model(config: Qwen3_5MoeTextConfig) -> Qwen3_5MoeForCausalLM:
    """A freshly initialised float32 model; DeltaNet decays start slow (time step 0.001 to 0.1)."""
    import torch

    model = Qwen3_5MoeForCausalLM(config)
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            bias = layer.linear_attn.dt_bias
            step = torch.empty_like(bias).uniform_(-6.9, -2.3).exp()
            bias.data.copy_(step + torch.log(-torch.expm1(-step)))
    return model.float()


def _common(rotary_dim: int) -> dict[str, object]:
    """Settings that both shapes share; `rotary_dim` leading dimensions of a head are rotated."""
    assert rotary_dim == 2 * sum(ROTARY_PAIRS_PER_AXIS)
    return {
        "tie_word_embeddings": False,
        "initializer_range": 0.03,
        "attn_implementation": "sdpa",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100_000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": list(ROTARY_PAIRS_PER_AXIS),
            "mrope_interleaved": True,
        },
    }
