"""Operations of the CPU kernels, over C-contiguous NumPy arrays that the caller owns.

T is the number of tokens. A token's result does not depend on the other tokens of the call, on the
number of threads or on how tokens are grouped into calls; all instruction sets give the same bits.
Weights are uint8 [rows, row_bytes] in GGUF blocks, `qtype` is ggml's type number
(`fomoe.gguf.quants.GGMLType`). Arrays of another dtype, rank or memory order are refused with a
TypeError, sizes that do not fit each other with a ValueError; nothing is converted or allocated.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fomoe.kernels.cpu import _cpu

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
U64 = npt.NDArray[np.uint64]
Cache = npt.NDArray[np.float16] | npt.NDArray[np.float32]


def set_threads(count: int) -> None:
    """Use `count` threads per call, the calling one included; 1 until this is called."""
    _cpu.set_threads(count)


def isa() -> str:
    """Return the instruction set in use: "scalar", "avx2" or "avx512vnni"."""
    return _cpu.isa()


def isa_report() -> str:
    """Return the set in use and, in brackets, why a better one is not: at start each set is tried.

    Every weight type is multiplied on fixed data; a set whose bits differ from the scalar set's
    is passed over.
    """
    return _cpu.isa_report()


def use_isa(name: str) -> None:
    """Switch to another instruction set of this machine; ValueError where it has none such."""
    _cpu.use_isa(name)


def stream_read(data: U8) -> int:
    """Read `data` [n] once on all threads, to measure what memory gives; return its bytes or-ed."""
    return _cpu.stream_read(data)


def call_seconds(n: int) -> float:
    """Return the mean seconds of `n` calls of the threads with two empty items each."""
    return _cpu.call_seconds(n)


def dequantize(qtype: int, weights: U8, out: F32) -> None:
    """Write the values of `weights` into `out` [rows, cols]."""
    _cpu.dequantize(qtype, weights, out)


def embed(qtype: int, weights: U8, ids: I32, out: F32) -> None:
    """Write the values of the rows `ids` [T] into `out` [T, cols]; ValueError for a wrong id."""
    _cpu.embed(qtype, weights, ids, out)


def quantize_activations(x: F32, q: I8, scale: F32) -> None:
    """Round `x` [T, K] to `q` int8 [T, K] in -127..127 with a `scale` [T, K / 32] per 32 values.

    scale = max |x| / 127 and q = x / scale, half to even; a scale of 0 gives zeros. K % 32 == 0.
    """
    _cpu.quantize_activations(x, q, scale)


def matmul_q8(qtype: int, weights: U8, q: I8, scale: F32, out: F32) -> None:
    """Write W x into `out` [T, rows] for int8 activations; quantised weight types only."""
    _cpu.matmul_q8(qtype, weights, q, scale, out)


def matmul_f32(qtype: int, weights: U8, x: F32, out: F32) -> None:
    """Write W x into `out` [T, rows] for float32 activations `x` [T, K], any weight type."""
    _cpu.matmul_f32(qtype, weights, x, out)


def experts(  # noqa: PLR0913 - the operands of one fused operation
    gate: U64,
    up: U64,
    down: U64,
    qtypes: tuple[int, int, int],
    hidden: int,
    width: int,
    x: F32,
    pair_start: I32,
    pair_token: I32,
    out: F32,
    exact_activations: bool,
) -> None:
    """Run n experts at memory addresses `gate`, `up`, `down` [n] (any alignment) on their tokens.

    Expert i has the pairs `pair_start[i]` to `pair_start[i + 1]` (`pair_start` [n + 1]); pair p
    belongs to row `pair_token[p]` of `x` [T, hidden] and writes
    down . (silu(gate . x) * (up . x)) into `out[p]` [P, hidden]. gate and up are
    [width, hidden], down is [hidden, width], their types are `qtypes`. `exact_activations` keeps
    activations in float32, otherwise they are int8 as in `quantize_activations`, except that a
    part with float weights takes float32. The bits are those of matmul, `silu_mul`,
    `quantize_activations` and matmul called one after the other. The addresses are trusted.
    """
    _cpu.experts(
        gate, up, down, qtypes, hidden, width, x, pair_start, pair_token, out, exact_activations
    )


def experts_sum(  # noqa: PLR0913 - the operands of one fused operation
    gate: U64,
    up: U64,
    down: U64,
    qtypes: tuple[int, int, int],
    hidden: int,
    width: int,
    x: F32,
    pair_start: I32,
    pair_token: I32,
    weights: F32,
    out: F32,
    exact_activations: bool,
) -> None:
    """Add the weighted rows of `experts` to `out` [T, hidden] without keeping them.

    For each pair p in turn: out[t] = fma(weights[p], row of pair p, out[t]) in float32, where
    t = pair_token[p]. From a zeroed `out`, and with experts in ascending id, the bits are those of
    `experts` and `reduce_pairs`. `weights` is float32 [P]; the rest is as in `experts`.
    """
    _cpu.experts_sum(
        gate, up, down, qtypes, hidden, width, x, pair_start, pair_token, weights, out,
        exact_activations,
    )  # fmt: skip


def reduce_pairs(pairs: F32, order: I32, weights: F32, out: F32) -> None:
    """Write the sum of k weighted rows of `pairs` [P, D] per token into `out` [T, D].

    `order` [T, k] names rows in ascending expert id, `weights` [T, k] is in the same order; the sum
    is a chain of float32 fma from 0 in that order.
    """
    _cpu.reduce_pairs(pairs, order, weights, out)


def rms_norm(x: F32, weight: F32, eps: float, out: F32) -> None:
    """Write x / sqrt(mean(x^2) + eps) * weight into `out`; `x` [T, D], may be `out` itself."""
    _cpu.rms_norm(x, weight, eps, out)


def gated_rms_norm(x: F32, z: F32, weight: F32, eps: float, out: F32) -> None:
    """Write rms_norm(x) * silu(z) into `out`, each head of len(weight) values on its own.

    `x`, `z` and `out` are [T, heads * d], `weight` is [d].
    """
    _cpu.gated_rms_norm(x, z, weight, eps, out)


def head_rms_norm(x: F32, weight: F32, eps: float) -> None:
    """Normalise each head of `x` [T, heads, d] in place; `weight` [d]."""
    _cpu.head_rms_norm(x, weight, eps)


def rope(x: F32, positions: I32, n_rot: int, base: float) -> None:
    """Rotate the first `n_rot` values of each head of `x` [T, heads, d] in place.

    The pair (i, i + n_rot / 2) turns by position * base^(-2 i / n_rot) (half-split pairs).
    """
    _cpu.rope(x, positions, n_rot, base)


def kv_store(k: F32, v: F32, cache_k: Cache, cache_v: Cache, position0: int) -> None:
    """Copy `k` and `v` [T, kv_heads, d] into the caches [S, kv_heads, d] from `position0` on."""
    _cpu.kv_store(k, v, cache_k, cache_v, position0)


def attention(q: F32, cache_k: Cache, cache_v: Cache, position0: int, out: F32) -> None:
    """Write causal attention of `q` [T, heads, d] over the caches [S, kv_heads, d] into `out`.

    Token t sees the positions 0 to position0 + t; head h reads kv head h // (heads / kv_heads);
    scores are divided by sqrt(d). d is a multiple of 8.
    """
    _cpu.attention(q, cache_k, cache_v, position0, out)


def sigmoid_gate(x: F32, gate: F32) -> None:
    """Multiply `x` [T, D] by sigmoid(gate) in place."""
    _cpu.sigmoid_gate(x, gate)


def conv_silu(x: F32, weight: F32, state: F32, out: F32) -> None:
    """Write silu of the causal depthwise convolution of `x` [T, C] into `out` [T, C].

    `weight` is [C, W] with the newest input's tap last; `state` [W - 1, C] holds the inputs before
    the first token, oldest first, and is moved on by T tokens.
    """
    _cpu.conv_silu(x, weight, state, out)


def deltanet(  # noqa: PLR0913 - the operands of one fused operation
    qkv: F32,
    alpha: F32,
    beta: F32,
    ssm_a: F32,
    dt_bias: F32,
    n_k_heads: int,
    n_v_heads: int,
    dk: int,
    dv: int,
    eps: float,
    state: F32,
    out: F32,
) -> None:
    """Run the gated delta rule token by token; `state` [n_v_heads, dk, dv] is updated.

    `qkv` is [T, 2 * n_k_heads * dk + n_v_heads * dv] (q, k, v after the convolution), `alpha`,
    `beta` [T, n_v_heads] are raw, `ssm_a` (= -exp(A_log)) and `dt_bias` [n_v_heads], `out`
    [T, n_v_heads * dv]. q and k are divided by sqrt(sum of squares + eps), q also by sqrt(dk);
    value head r uses key head r % n_k_heads. Per step: S *= exp(ssm_a * softplus(alpha + dt_bias));
    d = sigmoid(beta) * (v - S^T k); S += k d^T; out = S^T q. dv is a multiple of 8.
    """
    _cpu.deltanet(
        qkv, alpha, beta, ssm_a, dt_bias, n_k_heads, n_v_heads, dk, dv, eps, state, out
    )  # fmt: skip


def silu_mul(gate: F32, up: F32, out: F32) -> None:
    """Write silu(gate) * up into `out`, all [T, F]; `out` may be one of the inputs."""
    _cpu.silu_mul(gate, up, out)


def add(a: F32, b: F32) -> None:
    """Add `b` to `a` in place, both [T, D]."""
    _cpu.add(a, b)


def add3(routed: F32, shared: F32, residual: F32) -> None:
    """Set `residual` to (routed + shared) + residual, all [T, D]."""
    _cpu.add3(routed, shared, residual)


def scale_sigmoid(x: F32, gate: F32) -> None:
    """Multiply row t of `x` [T, D] by sigmoid(gate[t]) in place."""
    _cpu.scale_sigmoid(x, gate)
