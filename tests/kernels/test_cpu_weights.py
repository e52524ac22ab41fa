"""Dequantisation against the `gguf` package, and activations at the edges of their range."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from kernel_cases import BLOCKS_32, BLOCKS_256, FLOAT_KINDS, weights_of
from kernel_harness import Array, Guarded, available_isas

from fomoe.gguf.quants import GGMLType
from fomoe.kernels import reference
from fomoe.kernels.cpu import ops

BLOCKS = (*BLOCKS_32, *BLOCKS_256)
# Byte offsets of the half floats of each block (ggml-common.h).
HALVES = {
    **dict.fromkeys(BLOCKS_32, (0,)),
    Kind.Q4_1: (0, 2),
    Kind.Q5_1: (0, 2),
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.IQ4_XS: (0,),
}


@pytest.fixture(params=available_isas(), autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = ops.isa()
    ops.use_isa(request.param)
    yield
    ops.use_isa(before)


def dequantized(kind: Kind, w: Array, cols: int) -> Array:
    out = Guarded((len(w), cols), np.float32)
    ops.dequantize(int(kind), w, out.array)
    assert out.intact()
    return out.array


def filled(kind: Kind, byte: int, half: float) -> Array:
    """Two rows of two blocks whose bytes are all `byte`, their half floats `half`."""
    blocks = np.full((4, GGML_QUANT_SIZES[kind][1]), byte, np.uint8)
    for offset in HALVES[kind]:
        blocks[:, offset : offset + 2] = np.full((4, 1), half, "<f2").view(np.uint8)
    return blocks.reshape(2, -1)


def test_every_type_of_the_file_format_has_kernels() -> None:
    assert {int(k) for k in (*FLOAT_KINDS, *BLOCKS)} == {int(t) for t in GGMLType}


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda k: k.name)
def test_random_blocks(kind: Kind) -> None:
    cols = 5 * GGML_QUANT_SIZES[kind][0]
    w = weights_of(np.random.default_rng(3), kind, 33, cols)
    assert np.array_equal(dequantized(kind, w, cols), dequantize(w, kind))


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda k: k.name)
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x80, 0x7F, 0x55])
@pytest.mark.parametrize("half", [0.0, 1.0, -0.37, 65504.0, 2.0**-24])
def test_extreme_blocks(kind: Kind, byte: int, half: float) -> None:
    w, cols = filled(kind, byte, half), 2 * GGML_QUANT_SIZES[kind][0]
    assert np.array_equal(dequantized(kind, w, cols), dequantize(w, kind))


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda k: k.name)
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x80, 0x7F])
def test_products_of_extreme_blocks(kind: Kind, byte: int) -> None:
    """The largest quants against the largest activations: no 16-bit sum may saturate."""
    w, cols = filled(kind, byte, 1.0), 2 * GGML_QUANT_SIZES[kind][0]
    q, scale = np.full((3, cols), 127, np.int8), np.ones((3, cols // 32), np.float32)
    q[1], q[2, ::2] = -127, -127
    out = Guarded((3, 2), np.float32)
    ops.matmul_q8(int(kind), w, q, scale, out.array)
    expected = reference.matmul_q8(kind, w, q, scale)
    assert np.abs(out.array - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16], ids=lambda k: k.name)
def test_every_16_bit_float(kind: Kind) -> None:
    w = np.arange(2**16, dtype="<u2").view(np.uint8).reshape(16, -1)
    found, expected = dequantized(kind, w, 4096), dequantize(w, kind)
    assert np.array_equal(found, expected, equal_nan=True)


def test_long_rows_in_float32() -> None:
    rng, cols = np.random.default_rng(5), 16_384
    w, x = weights_of(rng, Kind.Q4_K, 64, cols), rng.standard_normal((2, cols), dtype=np.float32)
    out = np.empty((2, 64), np.float32)
    ops.matmul_f32(int(Kind.Q4_K), w, x, out)
    expected = reference.matmul_f32(Kind.Q4_K, w, x)
    assert np.linalg.norm(out - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q5_1], ids=lambda k: k.name)
def test_working_memory_of_an_earlier_call_is_not_read(kind: Kind) -> None:
    """Rows that end inside a chunk of 256 are padded: NaN of the call before must not get in."""
    rng = np.random.default_rng(8)
    w, long = weights_of(rng, kind, 3, 416), weights_of(rng, kind, 1, 1024)
    q, scale = quantized(rng.standard_normal((2, 416), dtype=np.float32))
    before, after = np.empty((2, 3), np.float32), np.empty((2, 3), np.float32)
    ops.matmul_q8(int(kind), w, q, scale, before)
    bad = np.full((2, 32), np.nan, np.float32)
    ops.matmul_q8(int(kind), long, np.ones((2, 1024), np.int8), bad, np.empty((2, 1), np.float32))
    ops.matmul_q8(int(kind), w, q, scale, after)
    assert np.array_equal(after, before)


def quantized(x: Array) -> tuple[Array, Array]:
    q = np.full(x.shape, 99, np.int8)
    scale = np.full((len(x), x.shape[1] // 32), 99, np.float32)
    ops.quantize_activations(x, q, scale)
    return q, scale


def test_zeros_have_scale_zero() -> None:
    q, scale = quantized(np.zeros((2, 64), np.float32))
    assert not q.any()
    assert not scale.any()


def test_half_goes_to_even() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :7] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]
    q, scale = quantized(x)
    assert scale[0, 0] == 1
    assert q[0, :7].tolist() == [127, 0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize("size", [1e-45, 1e-43, 2.6e-43, 1e-38, 1.0, 3.4e38])
def test_any_magnitude_matches_the_reference(size: float) -> None:
    rng = np.random.default_rng(11)
    x = (rng.uniform(-1, 1, (8, 256)) * size).astype(np.float32)
    q, scale = quantized(x)
    expected_q, expected_scale = reference.quantize_activations(x)
    assert np.array_equal(q, expected_q)
    assert np.array_equal(scale, expected_scale)
    assert q.min() >= -127


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_gives_minus_128(bad: float) -> None:
    x = np.linspace(-3, 3, 64, dtype=np.float32).reshape(1, 64)
    x[0, 5] = bad
    q, _ = quantized(x)
    assert q.min() >= -127
