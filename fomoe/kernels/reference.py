"""The kernels' arithmetic in NumPy float64: slow, plain, and what every device is tested against.

Each function is the twin of the operation of the same name in `fomoe.kernels.cpu.ops` and returns
its result instead of writing it. Inputs keep the dtypes of the operation; sums and transcendental
functions are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
Cache = npt.NDArray[np.float16] | npt.NDArray[np.float32]


def dequantize(qtype: int, weights: U8) -> F32:
    """Return the float32 values of `weights` uint8 [rows, row_bytes]."""
    values = gguf_dequantize(np.ascontiguousarray(weights), GGMLQuantizationType(qtype))
    return np.asarray(values, np.float32).reshape(len(weights), -1)


def embed(qtype: int, weights: U8, ids: I32) -> F32:
    """Return the values [T, cols] of the rows `ids` [T]."""
    return dequantize(qtype, weights[ids])


def quantize_activations(x: F32) -> tuple[I8, F32]:
    """Return int8 [T, K] and the float32 scale [T, K / 32] of each 32 values, bit for bit."""
    groups = x.reshape(len(x), -1, 32)
    scale = (np.abs(groups).max(axis=2) / np.float32(127)).astype(np.float32)
    safe = np.where(scale > 0, scale, np.float32(1))[..., None]
    ratio = np.where(scale[..., None] > 0, groups / safe, np.float32(0))
    q = np.rint(np.clip(ratio, -127, 127)).astype(np.int8)
    return q.reshape(x.shape), scale


def restore_activations(q: I8, scale: F32) -> F64:
    """Return the float64 values [T, K] that int8 activations stand for."""
    groups = q.reshape(len(q), -1, 32).astype(np.float64) * scale[..., None].astype(np.float64)
    return groups.reshape(q.shape)


def matmul_q8(qtype: int, weights: U8, q: I8, scale: F32) -> F64:
    """Return W x [T, rows] for int8 activations."""
    return restore_activations(q, scale) @ dequantize(qtype, weights).astype(np.float64).T


def matmul_f32(qtype: int, weights: U8, x: F32) -> F64:
    """Return W x [T, rows] for float32 activations [T, K]."""
    return x.astype(np.float64) @ dequantize(qtype, weights).astype(np.float64).T


def sigmoid(x: npt.NDArray[np.floating]) -> F64:
    """Return 1 / (1 + exp(-x)) without overflow."""
    e = np.exp(-np.abs(x.astype(np.float64)))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def silu(x: npt.NDArray[np.floating]) -> F64:
    """Return x * sigmoid(x)."""
    return x.astype(np.float64) * sigmoid(x)


def silu_mul(gate: npt.NDArray[np.floating], up: npt.NDArray[np.floating]) -> F64:
    """Return silu(gate) * up."""
    return silu(gate) * up


def sigmoid_gate(x: F32, gate: F32) -> F64:
    """Return x * sigmoid(gate)."""
    return x * sigmoid(gate)


def scale_sigmoid(x: F32, gate: F32) -> F64:
    """Return row t of `x` [T, D] times sigmoid(gate[t])."""
    return x * sigmoid(gate)[:, None]


def rms_norm(x: F32, weight: F32, eps: float) -> F64:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    wide = x.astype(np.float64)
    mean = (wide**2).mean(axis=-1, keepdims=True)
    return np.asarray(wide / np.sqrt(mean + eps) * weight, np.float64)


def gated_rms_norm(x: F32, z: F32, weight: F32, eps: float) -> F64:
    """Return rms_norm(x) * silu(z) per head of len(weight) values, [T, heads * d]."""
    heads = rms_norm(x.reshape(len(x), -1, len(weight)), weight, eps)
    return heads.reshape(x.shape) * silu(z)


head_rms_norm = rms_norm


def rope(x: F32, positions: I32, n_rot: int, base: float) -> F64:
    """Return `x` [T, heads, d] with its first `n_rot` dims rotated in half-split pairs."""
    half = n_rot // 2
    angle = positions[:, None] * base ** (-2.0 * np.arange(half) / max(n_rot, 1))
    cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]
    out = x.astype(np.float64)
    a, b = x[..., :half].astype(np.float64), x[..., half:n_rot].astype(np.float64)
    out[..., :half] = a * cosine - b * sine
    out[..., half:n_rot] = b * cosine + a * sine
    return out


def attention(q: F32, cache_k: Cache, cache_v: Cache, position0: int) -> F64:
    """Return causal attention [T, heads, d]; token t sees positions 0 to position0 + t."""
    tokens, heads, dim = q.shape
    group = heads // cache_k.shape[1]
    out = np.empty(q.shape)
    for t in range(tokens):
        seen = position0 + t + 1
        for h in range(heads):
            keys = cache_k[:seen, h // group].astype(np.float64)
            scores = keys @ q[t, h].astype(np.float64) / np.sqrt(dim)
            mass = np.exp(scores - scores.max())
            out[t, h] = mass @ cache_v[:seen, h // group].astype(np.float64) / mass.sum()
    return out


def conv_silu(x: F32, weight: F32, state: F32) -> tuple[F64, F32]:
    """Return silu of the causal depthwise convolution [T, C] and the state after it."""
    inputs = np.concatenate([state, x])
    width = weight.shape[1]
    windows = np.lib.stride_tricks.sliding_window_view(inputs, width, axis=0)  # [T, C, W]
    out = silu((windows.astype(np.float64) * weight).sum(axis=2))
    return out, inputs[len(inputs) - width + 1 :]


@dataclass(frozen=True, slots=True)
class DeltaHeads:
    """Head counts and sizes of a DeltaNet layer."""

    n_k_heads: int
    n_v_heads: int
    dk: int
    dv: int


@dataclass(frozen=True, slots=True)
class DeltaGates:
    """Raw alpha and beta [T, n_v_heads]; ssm_a (= -exp(A_log)) and dt_bias [n_v_heads]."""

    alpha: F32
    beta: F32
    ssm_a: F32
    dt_bias: F32


def deltanet(
    qkv: F32, gates: DeltaGates, heads: DeltaHeads, eps: float, state: F32
) -> tuple[F64, F64]:
    """Return the outputs [T, n_v_heads * dv] of the gated delta rule and the state after them."""
    n, keys = len(qkv), heads.n_k_heads * heads.dk
    q, k, v = np.split(qkv.astype(np.float64), [keys, 2 * keys], axis=1)
    q, k = (_l2_norm(a.reshape(n, heads.n_k_heads, heads.dk), eps) for a in (q, k))
    v = v.reshape(n, heads.n_v_heads, heads.dv)
    decay = np.exp(gates.ssm_a * np.logaddexp(0.0, gates.alpha.astype(np.float64) + gates.dt_bias))
    beta = sigmoid(gates.beta)
    out, memory = np.empty(v.shape), state.astype(np.float64)
    for t in range(n):
        for r in range(heads.n_v_heads):
            key, query = k[t, r % heads.n_k_heads], q[t, r % heads.n_k_heads] / np.sqrt(heads.dk)
            memory[r] *= decay[t, r]
            delta = beta[t, r] * (v[t, r] - key @ memory[r])
            memory[r] += np.outer(key, delta)
            out[t, r] = query @ memory[r]
    return out.reshape(n, -1), memory


def _l2_norm(x: F64, eps: float) -> F64:
    return np.asarray(x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + eps), np.float64)


@dataclass(frozen=True, slots=True)
class Expert:
    """Weights of an expert with their types: gate, up [width, hidden], down [hidden, width]."""

    gate: U8
    up: U8
    down: U8
    qtypes: tuple[int, int, int]


def experts(pool: Sequence[Expert], x: F32, pair_start: I32, pair_token: I32) -> F64:
    """Return down . (silu(gate . x) * (up . x)) [P, hidden] per pair, without rounding to int8."""
    out = np.empty((len(pair_token), x.shape[1]))
    for i, expert in enumerate(pool):
        pairs = slice(int(pair_start[i]), int(pair_start[i + 1]))
        gate, up, down = (
            dequantize(qtype, weights).astype(np.float64)
            for qtype, weights in zip(
                expert.qtypes, (expert.gate, expert.up, expert.down), strict=True
            )
        )
        rows = x[pair_token[pairs]].astype(np.float64)
        out[pairs] = silu_mul(rows @ gate.T, rows @ up.T) @ down.T
    return out


def experts_sum(
    pool: Sequence[Expert], x: F32, pair_start: I32, pair_token: I32, weights: F32
) -> F64:
    """Return the weighted sums [T, hidden] of the rows of `experts`."""
    out = np.zeros(x.shape)
    np.add.at(out, pair_token, experts(pool, x, pair_start, pair_token) * weights[:, None])
    return out


def reduce_pairs(pairs: F32, order: I32, weights: F32) -> F32:
    """Return the weighted sums [T, D], each a chain of float32 fma from 0 in the order given.

    A product of two float32 is exact in float64, so adding there and rounding once is an fma but
    for double roundings, which take a tie within 2^-29.
    """
    total = np.zeros((len(order), pairs.shape[1]), np.float32)
    for j in range(order.shape[1]):
        product = pairs[order[:, j]].astype(np.float64) * weights[:, j, None]
        total = (product + total).astype(np.float32)
    return total


def add3(routed: F32, shared: F32, residual: F32) -> F32:
    """Return (routed + shared) + residual in float32."""
    return (routed + shared) + residual
