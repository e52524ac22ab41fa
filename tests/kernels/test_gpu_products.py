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


def normalised(rng: np.random.Generator, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """A vector [1, cols] and the weight of its norm."""
    x = 3 * rng.normal(size=(1, cols)).astype(np.float32)
    return x, rng.normal(1, 0.2, cols).astype(np.float32)


class Products:
    """One launch over matrices of the given types, with a kept h."""

    def __init__(self, gpu: GPU, kinds: tuple[Kind, ...], cols: int, options: Options) -> None:
        rng = np.random.default_rng(cols)
        self.kinds, self.int8 = kinds, options.int8
        self.x, self.norm = normalised(rng, cols)
        sizes = rng.integers(1, 40, len(kinds))
        self.blocks = [
            blocks_of(rng, kind, int(n), cols) for kind, n in zip(kinds, sizes, strict=True)
        ]
        self.outs = [DeviceArray.empty(gpu, (len(b),)) for b in self.blocks]
        self.kept = [
            DeviceArray.empty(gpu, (1, cols)),
            DeviceArray.empty(gpu, (1, cols), np.int8),
            DeviceArray.empty(gpu, (1, cols // 32, 2)),
        ]
        parts = [
            (placed(gpu, kind, b), out.address)
            for kind, b, out in zip(kinds, self.blocks, self.outs, strict=True)
        ]
        vectors = (DeviceArray(gpu, self.x).address, DeviceArray(gpu, self.norm).address)
        keep = Rows(*(array.address for array in self.kept))
        gpu.launch(project(gpu, *vectors, EPS, parts, keep=keep, options=options))

    def check_h(self) -> np.ndarray:
        """Compare all forms of the kept h; returns the float one."""
        h, q, scales = (array.read() for array in self.kept)
        assert_close(h, reference.rms_norm(self.x, self.norm, EPS), 1e-6)
        wanted, d = reference.quantize_activations(h)
        np.testing.assert_array_equal(q, wanted)
        np.testing.assert_array_equal(scales[..., 0], d)
        sums = wanted.reshape(1, -1, 32).sum(axis=2).astype(np.float32)
        np.testing.assert_array_equal(scales[..., 1], d * sums)
        return np.asarray(h)

    def check(self) -> None:
        h = self.check_h()
        for kind, weights, out in zip(self.kinds, self.blocks, self.outs, strict=True):
            assert_close(out.read(), expected_product(kind, weights, h, int8=self.int8))


# Rows that share a wave, and rows of several tiles the last of which is short; 416 is no power of 2.
@pytest.mark.parametrize(
    ("kinds", "cols"),
    [(QUANTS + FLOATS, 256), (QUANTS + FLOATS, 4352), ((Kind.Q8_0, Kind.Q5_0, *FLOATS), 416)],
    ids=["short", "long", "odd"],
)
def test_every_type_times_a_normalised_vector(
    gpu: GPU, kinds: tuple[Kind, ...], cols: int
) -> None:
    Products(gpu, kinds, cols, Options()).check()


def test_quantised_rows_times_floats(gpu: GPU) -> None:
    Products(gpu, QUANTS, 512, Options(int8=False)).check()


@pytest.mark.parametrize("kind", [Kind.Q5_K, Kind.BF16], ids=lambda kind: kind.name)
def test_rows_times_a_vector_are_added(gpu: GPU, kind: Kind) -> None:
    rng = np.random.default_rng(int(kind))
    x, blocks = rng.normal(size=(1, 512)).astype(np.float32), blocks_of(rng, kind, 37, 512)
    out = DeviceArray.empty(gpu, (37,))
    matrix, vector = placed(gpu, kind, blocks), upload_rows(gpu, x)
    gpu.launch(project_rows(gpu, vector, matrix, out.address, add=False))
    first = out.read()
    assert_close(first, expected_product(kind, blocks, x, int8=True))
    gpu.launch(project_rows(gpu, vector, matrix, out.address))
    np.testing.assert_array_equal(out.read(), first + first)


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
