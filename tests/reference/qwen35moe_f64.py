"""An independent forward pass of `qwen35moe` in NumPy float64, straight from a GGUF file.

It is the oracle of the model tests: plain code, whole sequences, nothing cached between calls and
nothing shared with the package. Weights are dequantised by the `gguf` package, one tensor (or one
expert) at a time. Formulas: the Qwen3-Next / Qwen3.5-MoE modelling code of transformers; layouts:
what llama.cpp's converter writes (norm weights with the +1 inside, `ssm_a` = -exp(A_log), value
heads tiled so that value head r uses key head r mod n_key_heads).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind

Array = npt.NDArray[np.float64]
KV_DTYPES = {"f16": np.float16, "f32": np.float32}
FLOAT_KINDS = (Kind.F32, Kind.F16, Kind.BF16)


@dataclass(frozen=True, slots=True)
class Result:
    """One forward pass: `logits` [T, V] and `router` logits [layers, T, experts]."""

    logits: Array
    router: Array

    def routing_margin(self, top_k: int) -> Array:
        """Smallest distance over the layers between the last chosen and the first unchosen expert.

        Returns [T]. Where it is of the size of an implementation's rounding error, that
        implementation may rightly choose another expert, and its logits differ at this position.
        """
        ranked = -np.sort(-self.router, axis=-1)
        if ranked.shape[-1] == top_k:
            return np.full(ranked.shape[1], np.inf)
        return np.asarray((ranked[..., top_k - 1] - ranked[..., top_k]).min(axis=0))


class Model:
    """A `qwen35moe` GGUF (all its shards) read by `gguf.GGUFReader`."""

    def __init__(self, path: Path | str, *, int8: bool = False) -> None:
        readers = [gguf.GGUFReader(shard) for shard in shards_of(Path(path))]
        self._fields = readers[0].fields
        self._tensors = {t.name: t for reader in readers for t in reader.tensors}
        self._int8 = int8
        self.layers = self.get("block_count") - self.get("nextn_predict_layers", 0)
        self.interval = self.get("full_attention_interval", 4)
        self.top_k = self.get("expert_used_count")
        self.n_experts = self.get("expert_count")
        self.eps = self.get("attention.layer_norm_rms_epsilon")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `qwen35moe.<key>`; KeyError when it is absent and has no default."""
        field = self._fields.get(f"qwen35moe.{key}")
        if field is None and default is None:
            raise KeyError(key)
        return default if field is None else field.contents()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def weight(self, name: str, expert: int | None = None) -> Array:
        """One tensor, or one expert of a 3-D tensor, dequantised: [rows, columns] or [n]."""
        tensor = self._tensors[name]
        data = tensor.data if expert is None else tensor.data[expert]
        return np.asarray(
            gguf.dequantize(np.ascontiguousarray(data), tensor.tensor_type), np.float64
        )

    def linear(self, x: Array, name: str, expert: int | None = None) -> Array:
        """`x` [T, columns] times the transposed matrix `<name>.weight`: [T, rows]."""
        blocks = self._tensors[f"{name}.weight"].tensor_type not in FLOAT_KINDS
        if self._int8 and blocks:
            x = int8_per_32(x)
        return x @ self.weight(f"{name}.weight", expert).T

    def norm(self, x: Array, name: str) -> Array:
        """RMS norm over the last axis with the weights `<name>.weight`."""
        return rms(x, self.eps) * self.weight(f"{name}.weight")


def shards_of(path: Path) -> list[Path]:
    """All files of a split GGUF, first to last; the path itself when it is not split."""
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    stem, count = match[1], int(match[2])
    return [path.with_name(f"{stem}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]


def forward(
    path: Path | str,
    tokens: Sequence[int] | npt.NDArray[Any],
    *,
    kv: str = "f32",
    activations: str = "f32",
) -> Result:
    """Run `tokens` from position 0 through the model at `path`.

    `kv` ("f16" or "f32") is the precision that keys (after norm and rotation) and values are
    rounded to before attention reads them. With `activations` "int8" the input of every matrix in
    quantised blocks is rounded to int8 per 32 values first. Everything else is float64.
    """
    model = Model(path, int8=activations == "int8")
    ids = np.asarray(tokens, dtype=np.int64)
    residual = model.weight("token_embd.weight")[ids]
    router = np.empty((model.layers, len(ids), model.n_experts))
    for layer in range(model.layers):
        block = f"blk.{layer}"
        x = model.norm(residual, f"{block}.attn_norm")
        if (layer + 1) % model.interval == 0:
            residual = residual + full_attention(model, block, x, KV_DTYPES[kv])
        else:
            residual = residual + delta_net(model, block, x)
        x = model.norm(residual, f"{block}.post_attention_norm")
        routed, router[layer] = routed_experts(model, block, x)
        residual = residual + (routed + shared_expert(model, block, x))
    x = model.norm(residual, "output_norm")
    head = "output" if "output.weight" in model else "token_embd"
    return Result(logits=model.linear(x, head), router=router)


def full_attention(model: Model, block: str, x: Array, kv_dtype: Any) -> Array:
    """Causal grouped-query attention with per-head norms, partial rotation and an output gate."""
    steps = len(x)
    heads, kv_heads = model.get("attention.head_count"), model.get("attention.head_count_kv")
    dim = model.get("attention.key_length")
    query_gate = model.linear(x, f"{block}.attn_q").reshape(steps, heads, 2, dim)
    gate = query_gate[:, :, 1]
    query = rotate(model, model.norm(query_gate[:, :, 0], f"{block}.attn_q_norm"))
    key = model.linear(x, f"{block}.attn_k").reshape(steps, kv_heads, dim)
    key = rotate(model, model.norm(key, f"{block}.attn_k_norm"))
    value = model.linear(x, f"{block}.attn_v").reshape(steps, kv_heads, dim)
    key, value = (a.astype(kv_dtype).astype(np.float64) for a in (key, value))
    out = np.empty((steps, heads, dim))
    for t in range(steps):
        for h in range(heads):
            source = h // (heads // kv_heads)
            scores = key[: t + 1, source] @ query[t, h] / np.sqrt(dim)
            out[t, h] = softmax(scores) @ value[: t + 1, source]
    out *= sigmoid(gate)
    return model.linear(out.reshape(steps, heads * dim), f"{block}.attn_output")


def rotate(model: Model, x: Array) -> Array:
    """Rotary embedding of [T, heads, dim]: pairs (i, i + n/2) of the first n dimensions."""
    n = model.get("rope.dimension_count")
    half = n // 2
    frequency = model.get("rope.freq_base") ** (-np.arange(half) / half)
    angle = (np.arange(len(x))[:, None] * frequency)[:, None, :]
    first, second = x[..., :half], x[..., half:n]
    turned_first = first * np.cos(angle) - second * np.sin(angle)
    turned_second = second * np.cos(angle) + first * np.sin(angle)
    return np.concatenate([turned_first, turned_second, x[..., n:]], axis=-1)


def delta_net(model: Model, block: str, x: Array) -> Array:
    """Gated DeltaNet: convolution, delta rule one step at a time, gated norm, projection."""
    steps = len(x)
    k_heads, v_heads = model.get("ssm.group_count"), model.get("ssm.time_step_rank")
    k_dim = model.get("ssm.state_size")
    v_dim = model.get("ssm.inner_size") // v_heads
    mixed = causal_conv(
        model.linear(x, f"{block}.attn_qkv"), model.weight(f"{block}.ssm_conv1d.weight")
    )
    q, k, v = np.split(mixed, [k_heads * k_dim, 2 * k_heads * k_dim], axis=1)
    q = unit(q.reshape(steps, k_heads, k_dim), model.eps) / np.sqrt(k_dim)
    k = unit(k.reshape(steps, k_heads, k_dim), model.eps)
    v = v.reshape(steps, v_heads, v_dim)
    beta = sigmoid(model.linear(x, f"{block}.ssm_beta"))
    step_size = softplus(
        model.linear(x, f"{block}.ssm_alpha") + model.weight(f"{block}.ssm_dt.bias")
    )
    decay = np.exp(model.weight(f"{block}.ssm_a") * step_size)
    out = np.empty((steps, v_heads, v_dim))
    for head in range(v_heads):
        source = head % k_heads
        state = np.zeros((k_dim, v_dim))
        for t in range(steps):
            state *= decay[t, head]
            delta = beta[t, head] * (v[t, head] - k[t, source] @ state)
            state += np.outer(k[t, source], delta)
            out[t, head] = q[t, source] @ state
    z = model.linear(x, f"{block}.attn_gate").reshape(steps, v_heads, v_dim)
    gated = model.norm(out, f"{block}.ssm_norm") * silu(z)
    return model.linear(gated.reshape(steps, v_heads * v_dim), f"{block}.ssm_out")


def causal_conv(x: Array, kernel: Array) -> Array:
    """Depthwise causal convolution of [T, C] with [C, W] from a zero past, then SiLU."""
    width = kernel.shape[1]
    padded = np.concatenate([np.zeros((width - 1, x.shape[1])), x])
    out = np.zeros_like(x)
    for tap in range(width):
        out += padded[tap : tap + len(x)] * kernel[:, tap]
    return silu(out)


def routed_experts(model: Model, block: str, x: Array) -> tuple[Array, Array]:
    """The weighted sum of each token's top-k experts [T, D], and the router logits [T, E]."""
    logits = model.linear(x, f"{block}.ffn_gate_inp")
    probability = softmax(logits)
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, : model.top_k]
    weight = np.take_along_axis(probability, chosen, axis=1)
    weight /= weight.sum(axis=1, keepdims=True)
    out = np.zeros_like(x)
    for expert in range(model.n_experts):
        token, rank = np.nonzero(chosen == expert)
        if len(token):
            out[token] += weight[token, rank][:, None] * one_expert(model, block, expert, x[token])
    return out, logits


def one_expert(model: Model, block: str, expert: int, x: Array) -> Array:
    """down(silu(gate x) * up x) of one routed expert for the rows of `x`."""
    if f"{block}.ffn_gate_up_exps.weight" in model:
        gate, up = np.split(model.linear(x, f"{block}.ffn_gate_up_exps", expert), 2, axis=1)
    else:
        gate = model.linear(x, f"{block}.ffn_gate_exps", expert)
        up = model.linear(x, f"{block}.ffn_up_exps", expert)
    return model.linear(silu(gate) * up, f"{block}.ffn_down_exps", expert)


def shared_expert(model: Model, block: str, x: Array) -> Array:
    """The expert that every token uses, times the sigmoid of its own gate."""
    hidden = silu(model.linear(x, f"{block}.ffn_gate_shexp"))
    hidden = hidden * model.linear(x, f"{block}.ffn_up_shexp")
    gate = sigmoid(x @ model.weight(f"{block}.ffn_gate_inp_shexp.weight").reshape(-1))
    return model.linear(hidden, f"{block}.ffn_down_shexp") * gate[:, None]


def int8_per_32(x: Array) -> Array:
    """`x` as 32 values at a time round to it: int8 times a float32 scale of absmax / 127."""
    blocks = x.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float32).astype(np.float64)
    rounded = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return np.asarray((rounded * scale).reshape(x.shape))


def rms(x: Array, eps: float) -> Array:
    """`x` divided by its root mean square over the last axis."""
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


def unit(x: Array, eps: float) -> Array:
    """`x` divided by its Euclidean length over the last axis."""
    return np.asarray(x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + eps))


def sigmoid(x: Array) -> Array:
    """The logistic function, without overflow for large negative x."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))


def silu(x: Array) -> Array:
    """`x` times its sigmoid."""
    return x * sigmoid(x)


def softplus(x: Array) -> Array:
    """log(1 + exp(x))."""
    return np.asarray(np.logaddexp(0.0, x))


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def relative_l2(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> Array:
    """Euclidean length of the difference over that of `expected`, per row: [T]."""
    expected = np.asarray(expected, dtype=np.float64)
    error = np.linalg.norm(np.asarray(actual, dtype=np.float64) - expected, axis=-1)
    return np.asarray(error / np.linalg.norm(expected, axis=-1))
