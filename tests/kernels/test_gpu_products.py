"""Matrix-vector products of the GPU kernels, run on the CPU, against NumPy float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from kernels.product_arrays import DeviceArray, upload_rows
from support.emulated_gpu import emulated_gpu
from support.random_blocks import random_matrix

from fomoe.errors import DeviceError
from fomoe.kernels import reference
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.matrices import Matrix, place
from fomoe.kernels.gpu.products import Options, project, project_rows, share_groups
from fomoe.kernels.gpu.step import Rows
from fomoe.kernels.gpu.tuning import Tuning

EPS = 1e-6
FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
QUANTS = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q8_0, Kind.Q5_0, Kind.IQ4_XS)

# float32 sums over K values in 32 to 64 lanes round with a relative error near sqrt(K) 2^-24
TOLERANCE = 3e-6


@pytest.fixture(scope="module", params=[(32, 3), (64, 5)], ids=["wave32", "wave64"])
def gpu(request: pytest.FixtureRequest) -> Iterator[GPU]:
    wave, seed = request.param
    with emulated_gpu(wave, seed) as opened:
        yield opened


def blocks_of(rng: np.random.Generator, kind: Kind, rows: int, cols: int) -> np.ndarray:
    made = random_matrix(rng, (rows, cols), cols**-0.5, kind)
    return np.ascontiguousarray(made).view(np.uint8).reshape(rows, -1)


def placed(gpu: GPU, kind: Kind, blocks: np.ndarray) -> Matrix:
    return place(gpu, int(kind), blocks)


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    scale = np.abs(expected).max()
    assert scale > 0
    assert np.abs(got - expected).max() <= tolerance * scale


def expected_product(kind: Kind, blocks: np.ndarray, h: np.ndarray, *, int8: bool) -> np.ndarray:
    if int8 and kind in QUANTS:
        q, scale = reference.quantize_activations(h)
        return reference.matmul_q8(int(kind), blocks, q, scale)[0]
    return reference.matmul_f32(int(kind), blocks, h)[0]


# Rows of less than a wave, of several segments, of a part of one; more rows than the waves take.
SHAPES = {kind: ((37, 256), (9, 768), (5, 4352)) for kind in QUANTS}
SHAPES |= {kind: ((37, 32), (21, 416), (5, 4128)) for kind in (Kind.Q8_0, Kind.Q5_0)}
SHAPES |= {kind: ((37, 32), (9, 416), (3, 2080)) for kind in FLOATS}


@pytest.mark.parametrize("kind", SHAPES, ids=lambda kind: kind.name)
def test_rows_times_a_vector(gpu: GPU, kind: Kind) -> None:
    rng = np.random.default_rng(int(kind))
    for rows, cols in SHAPES[kind]:
        x = rng.normal(size=(1, cols)).astype(np.float32)
        blocks = blocks_of(rng, kind, rows, cols)
        before = rng.normal(size=rows).astype(np.float32)
        out = DeviceArray(gpu, before)
        matrix, vector = placed(gpu, kind, blocks), upload_rows(gpu, x)
        gpu.launch(project_rows(gpu, vector, matrix, out.address, add=False))
        product = expected_product(kind, blocks, x, int8=True)
        first = out.read()
        assert_close(first, product)
        gpu.launch(project_rows(gpu, vector, matrix, out.address))
        np.testing.assert_array_equal(out.read(), first + first)


@pytest.mark.parametrize("kind", QUANTS, ids=lambda kind: kind.name)
def test_quantised_rows_times_floats(gpu: GPU, kind: Kind) -> None:
    rng = np.random.default_rng(int(kind))
    x = rng.normal(size=(1, 768)).astype(np.float32)
    blocks = blocks_of(rng, kind, 7, 768)
    out = DeviceArray.empty(gpu, (7,))
    rows = Rows(upload_rows(gpu, x).x, 0, 0)
    options = Options(int8=False)
    matrix = placed(gpu, kind, blocks)
    gpu.launch(project_rows(gpu, rows, matrix, out.address, add=False, options=options))
    assert_close(out.read(), reference.matmul_f32(int(kind), blocks, x)[0])


@pytest.mark.parametrize("int8", [True, False])
def test_several_matrices_of_a_normalised_vector(gpu: GPU, int8: bool) -> None:
    rng = np.random.default_rng(7)
    cols, kinds = 512, (Kind.Q4_K, Kind.F32, Kind.Q6_K, Kind.Q4_K)
    x = 3 * rng.normal(size=(1, cols)).astype(np.float32)
    norm = rng.normal(1, 0.2, cols).astype(np.float32)
    blocks = [blocks_of(rng, kind, rows, cols) for kind, rows in zip(kinds, (70, 5, 33, 1))]
    outs = [DeviceArray.empty(gpu, (len(b),)) for b in blocks]
    parts = [(placed(gpu, k, b), o.address) for k, b, o in zip(kinds, blocks, outs, strict=True)]
    kept = [
        DeviceArray.empty(gpu, (1, cols)),
        DeviceArray.empty(gpu, (1, cols), np.int8),
        DeviceArray.empty(gpu, (1, cols // 32, 2)),
    ]
    keep = Rows(*(array.address for array in kept))
    addresses = (DeviceArray(gpu, x).address, DeviceArray(gpu, norm).address)
    gpu.launch(project(gpu, *addresses, EPS, parts, keep=keep, options=Options(int8=int8)))

    h, q, scales = (array.read() for array in kept)
    assert_close(h, reference.rms_norm(x, norm, EPS), 1e-6)
    wanted_q, wanted_scale = reference.quantize_activations(h)
    np.testing.assert_array_equal(q, wanted_q)
    np.testing.assert_array_equal(scales[..., 0], wanted_scale)
    sums = wanted_q.reshape(1, -1, 32).sum(axis=2).astype(np.float32)
    np.testing.assert_array_equal(scales[..., 1], wanted_scale * sums)
    for kind, weights, out in zip(kinds, blocks, outs, strict=True):
        assert_close(out.read(), expected_product(kind, weights, h, int8=int8))


def test_zeros_stay_zeros(gpu: GPU) -> None:
    rng = np.random.default_rng(1)
    matrix = placed(gpu, Kind.Q4_K, blocks_of(rng, Kind.Q4_K, 8, 256))
    out = DeviceArray.empty(gpu, (8,))
    x, norm = (DeviceArray(gpu, np.full(256, v, np.float32)).address for v in (0, 1))
    gpu.launch(project(gpu, x, norm, EPS, [(matrix, out.address)]))
    np.testing.assert_array_equal(out.read(), np.zeros(8, np.float32))


def test_tuning_changes_no_row_of_one_segment(gpu: GPU) -> None:
    rng = np.random.default_rng(2)
    matrix = placed(gpu, Kind.Q6_K, blocks_of(rng, Kind.Q6_K, 19, 1024))
    rows = upload_rows(gpu, rng.normal(size=(1, 1024)).astype(np.float32))
    seen = []
    for tuning in (Tuning(1, 1, 2), Tuning(2, 3, 4, held=0)):
        out = DeviceArray.empty(gpu, (19,))
        options = Options(tuning=tuning)
        gpu.launch(project_rows(gpu, rows, matrix, out.address, add=False, options=options))
        seen.append(out.read())
    np.testing.assert_array_equal(*seen)


def test_what_cannot_be_multiplied_is_refused_by_name(gpu: GPU) -> None:
    rng = np.random.default_rng(3)
    with pytest.raises(DeviceError, match="of type Q3_K; GPUs have kernels for BF16"):
        place(gpu, int(Kind.Q3_K), blocks_of(rng, Kind.Q3_K, 2, 256))
    with pytest.raises(DeviceError, match="48 columns"):
        place(gpu, int(Kind.F32), np.zeros((2, 192), np.uint8))
    one, other = (placed(gpu, Kind.F32, blocks_of(rng, Kind.F32, 2, n)) for n in (32, 64))
    with pytest.raises(DeviceError, match=r"\[32, 64\] columns"):
        project(gpu, 0, 0, EPS, [(one, 0), (other, 0)])
    with pytest.raises(DeviceError, match="activations for a F32 matrix are missing"):
        project_rows(gpu, Rows(0, 256, 256), one, 0)


def test_groups_go_where_the_bytes_are() -> None:
    assert share_groups([100, 100, 1], [50, 50, 50], 21) == [10, 10, 1]
    assert share_groups([100, 1], [3, 4], 100) == [3, 4]
    assert share_groups([5, 5, 5], [9, 9, 9], 2) == [1, 1, 1]
