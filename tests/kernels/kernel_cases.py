"""The table of operations: how to build a call of each, its sizes, its tolerance and why."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType as Kind
from kernel_harness import Array, Call, Case, Guarded
from support.random_blocks import random_matrix

from fomoe.kernels import reference
from fomoe.kernels.cpu import ops

EPS = 1e-6
FLOAT_KINDS = (Kind.F32, Kind.F16, Kind.BF16)
BLOCKS_32 = (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.IQ4_NL)
BLOCKS_256 = (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_XS)

Rng = np.random.Generator


def floats(rng: Rng, *shape: int) -> Array:
    return rng.standard_normal(shape, dtype=np.float32)


def weights_of(rng: Rng, kind: Kind, rows: int, cols: int) -> Array:
    """uint8 [rows, row_bytes] of random weights."""
    matrix = random_matrix(rng, (rows, cols), 0.05, kind)
    return np.ascontiguousarray(matrix).view(np.uint8).reshape(rows, -1)


def quantized(x: Array) -> tuple[Array, Array]:
    return reference.quantize_activations(x)


def matmul_q8(rng: Rng, kind: Kind, t: int, rows: int, cols: int) -> Call:
    w, (q, scale) = weights_of(rng, kind, rows, cols), quantized(floats(rng, t, cols))
    out = Guarded((t, rows), np.float32)
    expected = reference.matmul_q8(kind, w, q, scale)
    args = (int(kind), w, q, scale, out.array)
    return Call(ops.matmul_q8, args, (out,), (expected,), t, (2, 3, 4))


def matmul_f32(rng: Rng, kind: Kind, t: int, rows: int, cols: int) -> Call:
    w, x = weights_of(rng, kind, rows, cols), floats(rng, t, cols)
    out = Guarded((t, rows), np.float32)
    expected = reference.matmul_f32(kind, w, x)
    return Call(ops.matmul_f32, (int(kind), w, x, out.array), (out,), (expected,), t, (2, 3))


def embed(rng: Rng, kind: Kind, t: int, rows: int, cols: int) -> Call:
    w, ids = weights_of(rng, kind, rows, cols), rng.integers(0, rows, t).astype(np.int32)
    out = Guarded((t, cols), np.float32)
    expected = reference.embed(kind, w, ids)
    return Call(ops.embed, (int(kind), w, ids, out.array), (out,), (expected,), t, (2, 3))


def quantize_activations(rng: Rng, t: int, cols: int) -> Call:
    x = floats(rng, t, cols)
    q, scale = Guarded((t, cols), np.int8), Guarded((t, cols // 32), np.float32)
    args = (x, q.array, scale.array)
    return Call(ops.quantize_activations, args, (q, scale), quantized(x), t, (0, 1, 2))


def rms_norm(rng: Rng, t: int, d: int) -> Call:
    x, weight, out = floats(rng, t, d), floats(rng, d), Guarded((t, d), np.float32)
    expected = reference.rms_norm(x, weight, EPS)
    return Call(ops.rms_norm, (x, weight, EPS, out.array), (out,), (expected,), t, (0, 3))


def gated_rms_norm(rng: Rng, t: int, heads: int, d: int) -> Call:
    x, z, weight = floats(rng, t, heads * d), 4 * floats(rng, t, heads * d), floats(rng, d)
    out = Guarded(x.shape, np.float32)
    expected = reference.gated_rms_norm(x, z, weight, EPS)
    args = (x, z, weight, EPS, out.array)
    return Call(ops.gated_rms_norm, args, (out,), (expected,), t, (0, 1, 4))


def head_rms_norm(rng: Rng, t: int, heads: int, d: int) -> Call:
    values, weight = floats(rng, t, heads, d), floats(rng, d)
    x = Guarded.of(values)
    expected = reference.head_rms_norm(values, weight, EPS)
    return Call(ops.head_rms_norm, (x.array, weight, EPS), (x,), (expected,), t, (0,))


def rope(rng: Rng, t: int, heads: int, d: int, n_rot: int, first: int) -> Call:
    values, positions = floats(rng, t, heads, d), (first + np.arange(t)).astype(np.int32)
    x = Guarded.of(values)
    expected = reference.rope(values, positions, n_rot, 1e7)
    return Call(ops.rope, (x.array, positions, n_rot, 1e7), (x,), (expected,), t, (0, 1))


def kv_store(rng: Rng, dtype: str, t: int, heads: int, d: int, first: int) -> Call:
    k, v = floats(rng, t, heads, d), floats(rng, t, heads, d)
    caches = [Guarded.of(np.ones((first + t + 2, heads, d), dtype)) for _ in range(2)]
    expected = [np.ones_like(c.array) for c in caches]
    expected[0][first : first + t], expected[1][first : first + t] = k, v
    args = (k, v, caches[0].array, caches[1].array, first)
    return Call(ops.kv_store, args, tuple(caches), tuple(expected), t, (0, 1), 4)


def attention(rng: Rng, dtype: str, t: int, heads: int, kv_heads: int, d: int, first: int) -> Call:
    q = 2 * floats(rng, t, heads, d)
    k, v = (floats(rng, first + t + 1, kv_heads, d).astype(dtype) for _ in range(2))
    k[first + t :], v[first + t :] = np.nan, np.nan  # must never be read into a result
    out = Guarded(q.shape, np.float32)
    expected = reference.attention(q, k, v, first)
    return Call(ops.attention, (q, k, v, first, out.array), (out,), (expected,), t, (0, 4), 3)


def sigmoid_gate(rng: Rng, t: int, d: int) -> Call:
    values, gate = floats(rng, t, d), 5 * floats(rng, t, d)
    x = Guarded.of(values)
    expected = reference.sigmoid_gate(values, gate)
    return Call(ops.sigmoid_gate, (x.array, gate), (x,), (expected,), t, (0, 1))


def scale_sigmoid(rng: Rng, t: int, d: int) -> Call:
    values, gate = floats(rng, t, d), 5 * floats(rng, t)
    x = Guarded.of(values)
    expected = reference.scale_sigmoid(values, gate)
    return Call(ops.scale_sigmoid, (x.array, gate), (x,), (expected,), t, (0, 1))


def silu_mul(rng: Rng, t: int, d: int) -> Call:
    gate, up, out = 5 * floats(rng, t, d), floats(rng, t, d), Guarded((t, d), np.float32)
    expected = reference.silu_mul(gate, up)
    return Call(ops.silu_mul, (gate, up, out.array), (out,), (expected,), t, (0, 1, 2))


def add(rng: Rng, t: int, d: int) -> Call:
    a, b = floats(rng, t, d), floats(rng, t, d)
    total = Guarded.of(a)
    return Call(ops.add, (total.array, b), (total,), (a + b,), t, (0, 1))


def add3(rng: Rng, t: int, d: int) -> Call:
    routed, shared, residual = (floats(rng, t, d) for _ in range(3))
    total = Guarded.of(residual)
    expected = reference.add3(routed, shared, residual)
    return Call(ops.add3, (routed, shared, total.array), (total,), (expected,), t, (0, 1, 2))


def reduce_pairs(rng: Rng, t: int, k: int, d: int) -> Call:
    pairs, order = floats(rng, t * k, d), rng.permutation(t * k).reshape(t, k).astype(np.int32)
    weights, out = floats(rng, t, k), Guarded((t, d), np.float32)
    expected = reference.reduce_pairs(pairs, order, weights)
    args = (pairs, order, weights, out.array)
    return Call(ops.reduce_pairs, args, (out,), (expected,), t, (1, 2, 3))


def conv_silu(rng: Rng, t: int, channels: int, width: int) -> Call:
    x, weight, before = floats(rng, t, channels), floats(rng, channels, width), width - 1
    values = floats(rng, before, channels)
    state, out = Guarded.of(values), Guarded(x.shape, np.float32)
    expected, after = reference.conv_silu(x, weight, values)
    args = (x, weight, state.array, out.array)
    return Call(ops.conv_silu, args, (out, state), (expected, after), t, (0, 3))


def deltanet(rng: Rng, t: int, n_k: int, n_v: int, dk: int, dv: int) -> Call:
    heads = reference.DeltaHeads(n_k, n_v, dk, dv)
    qkv = floats(rng, t, 2 * n_k * dk + n_v * dv)
    gates = reference.DeltaGates(
        2 * floats(rng, t, n_v), floats(rng, t, n_v), -np.abs(floats(rng, n_v)), floats(rng, n_v)
    )
    values = floats(rng, n_v, dk, dv)
    state, out = Guarded.of(values), Guarded((t, n_v * dv), np.float32)
    expected, after = reference.deltanet(qkv, gates, heads, EPS, values)
    args = (
        qkv, gates.alpha, gates.beta, gates.ssm_a, gates.dt_bias,
        n_k, n_v, dk, dv, EPS, state.array, out.array,
    )  # fmt: skip
    return Call(ops.deltanet, args, (out, state), (expected, after), t, (0, 1, 2, 11))


def _matmul_sizes(kinds: tuple[Kind, ...], cols: tuple[int, int, int]) -> tuple[tuple, ...]:
    shapes = (
        (1, 33, cols[2]),
        (2, 3, cols[0]),
        (5, 33, cols[1]),
        (17, 3, cols[0]),
        (39, 2, cols[0]),  # panels, tiles of every size
        (12, 35, cols[1]),
        (100, 3, cols[2]),  # more tokens than one block takes
        (3, 1, cols[1]),
    )
    return tuple((kind, *shape) for kind in kinds for shape in shapes)


def _short_rows(kinds: tuple[Kind, ...]) -> tuple[tuple, ...]:
    """Rows of a part of a chunk, several of which are taken together; some stay over."""
    shapes = ((1, 33, 32), (1, 11, 64), (2, 9, 128), (1, 3, 64), (4, 8, 32), (9, 7, 128))
    return tuple((kind, *shape) for kind in kinds for shape in shapes)


ROUNDING = (
    "float32 sums in 8 to 32 lanes over K values round with a relative error near sqrt(K) 2^-24"
)
EXP = "exp is good to 2 ulp and is followed by two or three roundings"
EXACT = "the same roundings in the same order"
ELEMENTS = ((1, 1), (2, 7), (3, 64), (5, 129), (17, 1030))
HEADS = ((1, 3, 32), (2, 1, 64), (3, 2, 128), (5, 3, 256), (17, 1, 40))

CASES = (
    Case(
        "matmul_q8", matmul_q8,
        _matmul_sizes(BLOCKS_32, (32, 416, 4096)) + _matmul_sizes(BLOCKS_256, (256, 768, 4096))
        + _short_rows(BLOCKS_32),
        1e-5, ROUNDING,
    ),
    Case(
        "matmul_f32", matmul_f32,
        _matmul_sizes(FLOAT_KINDS, (1, 77, 4099)) + _matmul_sizes(BLOCKS_32, (32, 416, 4096))
        + _matmul_sizes(BLOCKS_256, (256, 768, 4096))
        # borders of tiles of rows and tokens, and of the depth that is unpacked at once
        + ((Kind.F32, 4, 5, 512), (Kind.F16, 8, 7, 513), (Kind.F32, 9, 6, 1055),
           (Kind.Q8_0, 33, 4, 544), (Kind.Q4_K, 65, 7, 1280)),
        1e-5, ROUNDING,
    ),
    Case(
        "embed", embed,
        tuple((kind, 3, 5, 4 * 256) for kind in (*FLOAT_KINDS, *BLOCKS_32, *BLOCKS_256)),
        0.0, EXACT,
    ),
    Case("quantize_activations", quantize_activations, ((1, 32), (5, 416), (17, 4096)), 0.0, EXACT),
    Case("rms_norm", rms_norm, ELEMENTS, 1e-6, "a float32 sum, a square root and two products"),
    Case("gated_rms_norm", gated_rms_norm, HEADS, 2e-6, EXP),
    Case("head_rms_norm", head_rms_norm, HEADS, 1e-6, "as rms_norm"),
    Case(
        "rope", rope,
        ((1, 3, 32, 32, 0), (2, 1, 64, 16, 100_000), (3, 2, 128, 2, 5), (5, 3, 256, 64, 262_139),
         (17, 1, 40, 0, 0), (3, 4, 24, 20, 9)),
        3e-7, "angles, sines and cosines are float64; two products and a sum are float32",
    ),
    Case(
        "kv_store", kv_store,
        (("f2", 1, 2, 32, 0), ("f2", 5, 3, 40, 7), ("f4", 3, 1, 64, 2), ("f2", 17, 2, 256, 1)),
        0.0, "rounding to float16 is IEEE's",
    ),
    Case(
        "attention", attention,
        (("f2", 1, 1, 1, 32, 0), ("f2", 5, 4, 2, 64, 3), ("f4", 3, 6, 2, 128, 254),
         ("f2", 17, 8, 2, 256, 300), ("f2", 2, 5, 5, 40, 1000), ("f2", 1, 16, 2, 256, 777),
         ("f4", 1, 2, 2, 32, 17_000),
         # borders of tiles of tokens, of blocks and of groups of heads
         ("f2", 1, 8, 1, 64, 255), ("f4", 1, 16, 2, 32, 256), ("f2", 3, 8, 2, 64, 253),
         ("f2", 4, 4, 4, 40, 255), ("f2", 5, 12, 1, 72, 251), ("f2", 8, 32, 2, 32, 256),
         ("f2", 9, 16, 2, 72, 249), ("f4", 33, 8, 1, 256, 230), ("f2", 33, 130, 2, 24, 500)),
        2e-6, "scores of some units carry 2^-24 of themselves into exp",
    ),
    Case("sigmoid_gate", sigmoid_gate, ELEMENTS, 1e-6, EXP),
    Case("scale_sigmoid", scale_sigmoid, ELEMENTS, 1e-6, EXP),
    Case("silu_mul", silu_mul, (*ELEMENTS, (33, 4096)), 1e-6, EXP),
    Case("add", add, (*ELEMENTS, (33, 4096)), 0.0, EXACT),
    Case("add3", add3, ELEMENTS, 0.0, EXACT),
    Case("reduce_pairs", reduce_pairs, ((1, 1, 1), (3, 10, 129), (17, 8, 1024)), 0.0, EXACT),
    Case(
        "conv_silu", conv_silu,
        ((1, 1, 4), (2, 7, 4), (3, 300, 2), (17, 1024, 4), (5, 40, 1), (1, 9000, 4)),
        1e-6, EXP,
    ),
    Case(
        "deltanet", deltanet,
        ((1, 1, 1, 32, 32), (2, 2, 4, 64, 64), (5, 2, 6, 128, 128), (17, 3, 3, 40, 8),
         (3, 1, 2, 32, 72), (4, 1, 2, 40, 200), (9, 2, 2, 33, 104), (33, 1, 3, 16, 48)),
        3e-6, "float32 sums over the key size, carried through T steps",
    ),
)  # fmt: skip
