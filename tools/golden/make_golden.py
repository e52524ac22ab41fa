"""Make the golden vectors: tiny random models, token ids and the logits that must come out.

    PYTHONPATH=tests:tools python tools/golden/make_golden.py tests/vectors

Needs torch, transformers and llama-cpp-python. Unquantised models get the logits of transformers'
`Qwen3_5MoeForCausalLM` on the very weights of the file; quantised ones, which llama.cpp's own
quantiser makes, those of `tests/reference/qwen35moe_f64.py` on the dequantised weights.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import torch
from hf_to_gguf import write_gguf
from reference.qwen35moe_f64 import Result, forward, relative_l2
from support.tiny_tokenizer import CHATML, tokenizer_json
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

VOCAB = 264
LENGTH, QUANTISED_LENGTH = 64, 24
TOKEN_SEEDS = 24
HALF_KEPT = ("conv1d.weight", "mlp.gate.weight", "shared_expert_gate.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """One model. `ftypes` are llama.cpp quantisations made from it; empty: the model itself."""

    name: str
    seed: int
    layers: int
    interval: int
    experts: int
    top_k: int
    hidden: int = 32
    width: int = 32
    shared_width: int = 32
    head_dim: int = 16
    heads: int = 4
    kv_heads: int = 2
    key_heads: int = 2
    value_heads: int = 4
    state_dim: int = 16
    tied: bool = False
    fused: bool = False
    tensor_type: str = "F32"
    ftypes: tuple[str, ...] = ()


GOLDENS = (
    Golden(name="f32_tied", seed=1, layers=3, interval=2, experts=8, top_k=2, tied=True),
    Golden(
        name="f16_untied", seed=2, layers=5, interval=4, experts=12, top_k=3, key_heads=3,
        value_heads=3, tensor_type="F16",
    ),
    Golden(
        name="f32_fused", seed=3, layers=3, interval=3, experts=6, top_k=2, value_heads=6,
        fused=True,
    ),
    # Rows of 256 for the K-quants; `down` has rows of 32, where llama.cpp falls back to 32-blocks
    # (Q4_K to Q5_0, Q5_K to Q5_1, Q2_K to Q4_0, IQ4_XS to IQ4_NL).
    Golden(
        name="narrow", seed=4, layers=2, interval=2, experts=3, top_k=2, hidden=256, heads=2,
        kv_heads=1, head_dim=32, key_heads=1, value_heads=2, state_dim=32, tied=True,
        ftypes=("Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K", "IQ4_XS"),
    ),
    # Experts of 256 x 256: every routed matrix is a K-quant, `down` Q4_K or Q6_K by layer.
    Golden(
        name="wide", seed=5, layers=2, interval=2, experts=3, top_k=2, hidden=256, width=256,
        shared_width=32, heads=2, kv_heads=1, head_dim=32, key_heads=1, value_heads=2,
        state_dim=32, tied=True, ftypes=("Q4_K_M",),
    ),
)  # fmt: skip


def text_config(golden: Golden) -> Qwen3_5MoeTextConfig:
    """The transformers configuration; a quarter (at least 4 dims) of each head is rotated."""
    rotary = max(golden.head_dim // 4, 4)
    half = rotary // 2
    kinds = ("linear_attention", "full_attention")
    return Qwen3_5MoeTextConfig(
        vocab_size=VOCAB,
        hidden_size=golden.hidden,
        num_hidden_layers=golden.layers,
        num_attention_heads=golden.heads,
        num_key_value_heads=golden.kv_heads,
        head_dim=golden.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=golden.tied,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000_000.0,
            "partial_rotary_factor": rotary / golden.head_dim,
            "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
            "mrope_interleaved": True,
        },
        linear_key_head_dim=golden.state_dim,
        linear_value_head_dim=golden.state_dim,
        linear_num_key_heads=golden.key_heads,
        linear_num_value_heads=golden.value_heads,
        moe_intermediate_size=golden.width,
        shared_expert_intermediate_size=golden.shared_width,
        num_experts=golden.experts,
        num_experts_per_tok=golden.top_k,
        layer_types=[kinds[(i + 1) % golden.interval == 0] for i in range(golden.layers)],
    )


def build(golden: Golden) -> Qwen3_5MoeForCausalLM:
    """The model in float64 with random weights that the file's types represent exactly."""
    model = Qwen3_5MoeForCausalLM(text_config(golden)).eval()
    model.set_experts_implementation("eager")  # the grouped one has no float64
    model.set_attn_implementation("eager")
    rng = np.random.default_rng(golden.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = random_parameter(rng, name, tuple(parameter.shape), golden).astype(np.float32)
            if golden.tensor_type == "F16" and values.ndim > 1 and not name.endswith(HALF_KEPT):
                values = values.astype(np.float16).astype(np.float32)
            parameter.copy_(torch.from_numpy(values))
    return model.double()


def random_parameter(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], golden: Golden
) -> npt.NDArray[np.float64]:
    """Values at the scale of a trained model: unit-variance activations, routers that decide."""
    if name.endswith("A_log"):
        return np.log(rng.uniform(1.0, 8.0, shape))
    if name.endswith("dt_bias"):
        return np.log(np.expm1(np.exp(rng.uniform(np.log(0.03), np.log(0.3), shape))))
    if name.endswith("norm.weight"):
        return rng.normal(1.0 if "linear_attn" in name else 0.0, 0.2, shape)
    scale = shape[-1] ** -0.5
    if name.endswith("embed_tokens.weight"):
        scale = 2.5 * scale if golden.tied else 1.0
    elif name.endswith("lm_head.weight"):
        scale *= 2.5
    elif name.endswith("mlp.gate.weight"):
        scale *= 1.5
    elif "down_proj" in name:
        scale *= 2.0
    return rng.normal(0.0, scale, shape)


def write_model(golden: Golden, model: Qwen3_5MoeForCausalLM, path: Path) -> None:
    """Write the model with its tokenizer and chat template."""
    write_gguf(
        {name: values.float().numpy() for name, values in model.state_dict().items()},
        model.config.to_dict(),
        path,
        tokenizer=tokenizer_json(VOCAB),
        chat_template=CHATML,
        tensor_type=golden.tensor_type,
        fused_gate_up=golden.fused,
        name=f"golden {golden.name}",
    )


def quantise(source: Path, target: Path, ftype: str) -> None:
    """Run llama.cpp's quantiser."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    params.nthread = 2
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if code:
        raise SystemExit(f"llama_model_quantize to {ftype} returned {code}")


def choose_tokens(path: Path, length: int, top_k: int) -> tuple[npt.NDArray[np.int32], Result]:
    """Random ids, of several draws those whose routing is the furthest from a tie."""
    draws = [
        np.random.default_rng(seed).integers(0, VOCAB, length, dtype=np.int32)
        for seed in range(TOKEN_SEEDS)
    ]
    results = [forward(path, ids) for ids in draws]
    best = int(np.argmax([r.routing_margin(top_k).min() for r in results]))
    return draws[best], results[best]


def save_vectors(path: Path, model: Qwen3_5MoeForCausalLM | None, top_k: int) -> None:
    """Write `<name>.npz` beside a model: ids, expected logits, routing margins."""
    tokens, result = choose_tokens(path, QUANTISED_LENGTH if model is None else LENGTH, top_k)
    expected = result.logits
    if model is not None:
        with torch.no_grad():
            expected = model(torch.from_numpy(tokens)[None].long()).logits[0].numpy()
        error = relative_l2(result.logits, expected).max()
        print(f"{path.name}: reference against transformers {error:.1e}")
    margin = result.routing_margin(top_k)
    print(f"{path.name}: {path.stat().st_size} B, least margin {margin.min():.1e}")
    np.savez_compressed(
        path.with_suffix(".npz"),
        tokens=tokens,
        logits=expected.astype(np.float32),
        margin=margin.astype(np.float32),
    )


def make(golden: Golden, folder: Path) -> None:
    """Write one entry of GOLDENS into `folder`."""
    model = build(golden)
    if not golden.ftypes:
        path = folder / f"{golden.name}.gguf"
        write_model(golden, model, path)
        save_vectors(path, model, golden.top_k)
        return
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source.gguf"
        write_model(golden, model, source)
        for ftype in golden.ftypes:
            path = folder / f"{golden.name}_{ftype.lower()}.gguf"
            quantise(source, path, ftype)
            save_vectors(path, None, golden.top_k)


def main() -> None:
    """Make all golden vectors, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="entries of GOLDENS; all when none is given")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for golden in GOLDENS:
        if not args.names or golden.name in args.names:
            make(golden, args.folder)


if __name__ == "__main__":
    main()
