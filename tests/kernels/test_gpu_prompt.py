"""The prompt's dense products and norms against float64, on the CPU stand-in."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from support.emulated_gpu import gpu_under_test
from support.gpu_memory import Memory
from support.random_blocks import random_matrix

from fomoe.kernels import reference
from fomoe.kernels.gpu import prompt
from fomoe.kernels.gpu.matrices import Matrix
from fomoe.kernels.gpu.prompt_tiles import FloatTile, Tile

EPS = 1e-6
FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
SMALL = (Kind.Q8_0, Kind.Q5_0)
LARGE = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_XS)
# Sums of K products in float32 round with a relative error near sqrt(K) 2^-24 of the largest.
SUMS = 2e-6


@pytest.fixture(params=[32, 64], ids=["wave32", "wave64"])
def gpu(request):
    with gpu_under_test(request.param, seed=11) as gpu:
        yield gpu


def blocks_of(rng, kind, rows, cols):
    matrix = random_matrix(rng, (rows, cols), 0.05, kind)
    return np.ascontiguousarray(matrix).view(np.uint8).reshape(rows, -1)


def close(found, expected, tolerance=SUMS):
    worst = np.abs(found - expected).max() / np.abs(expected).max()
    assert worst <= tolerance, worst


def placed(memory, kind, blocks, cols):
    return Matrix(memory.put(blocks), int(kind), len(blocks), cols)


FLOAT_TILES = (FloatTile(16, 16, 64, (4, 4), 32), FloatTile(32, 16, 64, (8, 4), 64))


def chunk_of(step, most, tile=None, int8=True):
    """A chunk of either kind of tile."""
    is_float = isinstance(tile, FloatTile)
    return prompt.Chunk(step, most, int8, None if is_float else tile, tile if is_float else None)


def check_matmul(gpu, kind, shape, tile=None, int8=True, add=False):
    tokens, rows, cols = shape
    rng, memory = np.random.default_rng(cols + tokens), Memory(gpu)
    blocks, x = blocks_of(rng, kind, rows, cols), rng.standard_normal((tokens, cols), np.float32)
    before = rng.standard_normal((tokens, rows), np.float32)
    out = memory.put(before)
    step, most = memory.step(tokens), tokens + 21  # more room than tokens: some groups have none
    chunk = chunk_of(step, most, tile, int8)
    matrix = placed(memory, kind, blocks, cols)
    gpu.launch(prompt.matmul(gpu, chunk, memory.rows(x), matrix, out, add))
    if chunk.is_int8(int(kind)):
        expected = reference.matmul_q8(kind, blocks, *reference.quantize_activations(x))
    else:
        expected = reference.matmul_f32(kind, blocks, x)
    close(memory.take(out), expected + before if add else expected)


@pytest.mark.parametrize("kind", LARGE, ids=lambda k: k.name)
def test_blocks_of_256_take_whole_and_ragged_tiles(gpu, kind):
    check_matmul(gpu, kind, (19, 37, 512), Tile(32, 16, 64, 2, 128))


@pytest.mark.parametrize("kind", SMALL, ids=lambda k: k.name)
def test_blocks_of_32_take_rows_of_any_number_of_them(gpu, kind):
    check_matmul(gpu, kind, (17, 35, 352), Tile(32, 16, 64, 2, 256), add=True)


def test_every_depth_of_copies_and_share_of_waves_gives_the_same_bits(gpu):
    rng, memory, cols = np.random.default_rng(3), Memory(gpu), 768
    blocks, x = blocks_of(rng, Kind.Q4_K, 40, cols), rng.standard_normal((33, cols), np.float32)
    rows, matrix = memory.rows(x), placed(memory, Kind.Q4_K, blocks, cols)
    results = []
    for tile in (Tile(32, 16, 64, 1, 256), Tile(64, 32, 128, 3, 64)):
        out = memory.put(np.zeros((33, 40), np.float32))
        chunk = prompt.Chunk(memory.step(33), 33, True, tile)
        gpu.launch(prompt.matmul(gpu, chunk, rows, matrix, out))
        results.append(memory.take(out).tobytes())
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("kind", "tile"), [*zip(FLOATS, (*FLOAT_TILES, None), strict=True)], ids=lambda k: str(k)[:12]
)
def test_float_weights_take_float_activations(gpu, kind, tile):
    check_matmul(gpu, kind, (35, 37, 96), tile, add=tile is None)


@pytest.mark.parametrize("kind", [Kind.Q5_0, Kind.Q4_K, Kind.Q6_K], ids=lambda k: k.name)
def test_quantised_weights_take_float_activations_when_asked(gpu, kind):
    check_matmul(gpu, kind, (5, 33, 256), FLOAT_TILES[1], int8=False)


def test_matrices_of_one_shape_share_a_launch(gpu):
    rng, memory, tokens, cols = np.random.default_rng(8), Memory(gpu), 5, 64
    shapes = ((Kind.F16, 20), (Kind.F32, 20), (Kind.F16, 20), (Kind.F16, 24), (Kind.F16, 20))
    x = rng.standard_normal((tokens, cols), np.float32)
    blocks = [blocks_of(rng, kind, rows, cols) for kind, rows in shapes]
    outs = [memory.put(np.zeros((tokens, rows), np.float32)) for _, rows in shapes]
    matrices = [placed(memory, kind, b, cols) for (kind, _), b in zip(shapes, blocks, strict=True)]
    chunk = chunk_of(memory.step(tokens), tokens, FLOAT_TILES[0])
    parts = list(zip(matrices, outs, strict=True))
    launches = prompt.matmuls(gpu, chunk, memory.rows(x), parts)
    assert len(launches) == 3
    for launch in launches:
        gpu.launch(launch)
    for (kind, _), weights, out in zip(shapes, blocks, outs, strict=True):
        close(memory.take(out), reference.matmul_f32(kind, weights, x))


@pytest.mark.parametrize("cols", [96, 1056])
def test_norm_rows_is_normed_and_quantised_as_the_reference_does(gpu, cols):
    rng, memory, tokens = np.random.default_rng(cols), Memory(gpu), 3
    x, weight = rng.standard_normal((tokens, cols), np.float32), rng.random(cols, np.float32)
    x[1, 32:64] = 0
    rows, chunk = memory.empty_rows(tokens, cols), prompt.Chunk(memory.step(tokens), 5)
    norm = prompt.Norm(memory.put(weight), cols, EPS)
    gpu.launch(prompt.norm_rows(gpu, chunk, memory.put(x), norm, rows))
    normed = memory.take(rows.x)
    close(normed, reference.rms_norm(x, weight, EPS), 1e-6)
    q, d = reference.quantize_activations(normed)
    scales = memory.take(rows.s)
    np.testing.assert_array_equal(memory.take(rows.q), q)
    np.testing.assert_array_equal(scales[..., 0], d)
    sums = q.reshape(tokens, -1, 32).sum(axis=2)
    np.testing.assert_array_equal(scales[..., 1], d * sums.astype(np.float32))


def test_dot_rows(gpu):
    rng, memory = np.random.default_rng(5), Memory(gpu)
    x, vector = rng.standard_normal((11, 96), np.float32), rng.standard_normal(96, np.float32)
    out, chunk = memory.put(np.zeros(11, np.float32)), prompt.Chunk(memory.step(11), 20)
    gpu.launch(prompt.dot_rows(gpu, chunk, memory.rows(x), memory.put(vector), 96, out))
    close(memory.take(out), x.astype(np.float64) @ vector)


@pytest.mark.parametrize(
    ("kinds", "int8"),
    [
        ((Kind.Q4_K, Kind.Q4_K), True),
        ((Kind.Q6_K, Kind.IQ4_XS), True),
        ((Kind.Q5_K, Kind.Q5_K), False),
    ],
    ids=["alike", "mixed", "float"],
)
def test_swiglu(gpu, kinds, int8):
    rng, memory, tokens, width, cols = np.random.default_rng(9), Memory(gpu), 19, 96, 256
    gate, up = (blocks_of(rng, kind, width, cols) for kind in kinds)
    x = rng.standard_normal((tokens, cols), np.float32)
    out = memory.empty_rows(tokens, width)
    chunk = prompt.Chunk(memory.step(tokens), tokens + 20, int8, Tile(64, 16, 128))
    matrices = [placed(memory, k, b, cols) for k, b in zip(kinds, (gate, up), strict=True)]
    gpu.launch(prompt.swiglu(gpu, chunk, memory.rows(x), *matrices, out))
    if int8:
        rounded = reference.quantize_activations(x)
        parts = [
            reference.matmul_q8(k, b, *rounded) for k, b in zip(kinds, (gate, up), strict=True)
        ]
        found = reference.restore_activations(memory.take(out.q), memory.take(out.s)[..., 0])
        tolerance = 1 / 250  # half a step of 127 to the largest value
    else:
        parts = [reference.matmul_f32(k, b, x) for k, b in zip(kinds, (gate, up), strict=True)]
        found, tolerance = memory.take(out.x), 4e-6
    close(found, reference.silu_mul(*parts), tolerance)
