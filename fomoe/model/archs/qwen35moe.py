"""Architecture `qwen35moe`: Qwen3.5 and Qwen3.6 mixture-of-experts models.

Key names are those of GGUF files as llama.cpp's converter writes them.
"""

from __future__ import annotations

from fomoe.errors import GGUFError
from fomoe.gguf.reader import GGUFFile
from fomoe.model.spec import AttentionSpec, DeltaSpec, LayerKind, ModelSpec, MoESpec

NAME = "qwen35moe"


def read_spec(file: GGUFFile) -> ModelSpec:
    """Return the specification; every number is bounded before anything is sized by it."""
    meta, p = file.metadata, NAME + "."
    blocks = meta.int(p + "block_count", lo=1, hi=1024)
    drafts = meta.int(p + "nextn_predict_layers", lo=0, hi=blocks - 1, default=0)
    hidden = meta.int(p + "embedding_length", lo=1, hi=1 << 17)
    tokens = file.tensors.get("token_embd.weight")
    if tokens is None or len(tokens.shape) != 2:
        raise GGUFError(file.path, "token_embd.weight", 0, "no embedding", "convert again")
    experts = meta.int(p + "expert_count", lo=1, hi=4096)
    return ModelSpec(
        architecture=NAME,
        name=meta.str("general.name", default=file.path.stem),
        hidden=hidden,
        vocab=tokens.shape[0],
        ctx_train=meta.int(p + "context_length", lo=1, hi=1 << 24),
        eps=meta.float(p + "attention.layer_norm_rms_epsilon"),
        layers=tuple(_kind(file, i) for i in range(blocks - drafts)),
        attention=_attention(file, hidden),
        delta=_delta(file),
        moe=MoESpec(
            n_experts=experts,
            top_k=meta.int(p + "expert_used_count", lo=1, hi=experts),
            expert_width=meta.int(p + "expert_feed_forward_length", lo=1, hi=1 << 17),
            shared_width=meta.int(p + "expert_shared_feed_forward_length", lo=1, hi=1 << 17),
        ),
    )


def _kind(file: GGUFFile, layer: int) -> LayerKind:
    return "attention" if f"blk.{layer}.attn_q.weight" in file.tensors else "delta"


def _attention(file: GGUFFile, hidden: int) -> AttentionSpec:
    meta, p = file.metadata, NAME + "."
    heads = meta.int(p + "attention.head_count", lo=1, hi=1024)
    kv_heads = meta.int(p + "attention.head_count_kv", lo=1, hi=heads)
    if heads % kv_heads:
        raise GGUFError(
            file.path, p + "attention.head_count_kv", 0,
            f"{heads} heads are no multiple of {kv_heads} key/value heads", "convert again",
        )  # fmt: skip
    head_dim = meta.int(p + "attention.key_length", lo=1, hi=1024, default=max(1, hidden // heads))
    rope_dims = meta.int(p + "rope.dimension_count", lo=2, hi=head_dim, default=head_dim)
    return AttentionSpec(
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_dims=rope_dims,
        rope_base=meta.float(p + "rope.freq_base", default=10_000.0),
    )


def _delta(file: GGUFFile) -> DeltaSpec:
    meta, p = file.metadata, NAME + "."
    v_heads = meta.int(p + "ssm.time_step_rank", lo=1, hi=4096)
    k_heads = meta.int(p + "ssm.group_count", lo=1, hi=v_heads)
    inner = meta.int(p + "ssm.inner_size", lo=1, hi=1 << 20)
    if v_heads % k_heads or inner % v_heads:
        raise GGUFError(
            file.path, p + "ssm.time_step_rank", 0,
            f"{v_heads} value heads fit neither {k_heads} key heads nor width {inner}",
            "convert the model again",
        )  # fmt: skip
    return DeltaSpec(
        n_k_heads=k_heads,
        n_v_heads=v_heads,
        key_dim=meta.int(p + "ssm.state_size", lo=1, hi=1024),
        value_dim=inner // v_heads,
        conv_width=meta.int(p + "ssm.conv_kernel", lo=2, hi=64),
    )
