"""Matrix-vector products of the GPU kernels, run on the CPU, against NumPy float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gpu_arrays import Guarded, RowsOut, check_rows, error
from support.emulated_gpu import gpu_under_test
from support.random_blocks import random_matrix

from fomoe.errors import DeviceError
from fomoe.kernels import reference
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.matrices import Matrix, place
from fomoe.kernels.gpu.products import Options, project, project_rows, share_groups
from fomoe.kernels.gpu.step import Rows
from fomoe.kernels.gpu.tuning import Tuning, fit, group_bytes

EPS = 1e-6
FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
QUANTS = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q8_0, Kind.Q5_0, Kind.IQ4_XS)

# float32 sums over K values in 32 to 64 lanes round with a relative error near sqrt(K) 2^-24
TOLERANCE = 3e-6


@pytest.fixture(scope="module", params=[32, 64], ids=["wave32", "wave64"])
def gpu(request: pytest.FixtureRequest) -> Iterator[GPU]:
    with gpu_under_test(request.param) as opened:
        yield opened


def blocks_of(rng: np.random.Generator, kind: Kind, rows: int, cols: int) -> np.ndarray:
    made = random_matrix(rng, (rows, cols), cols**-0.5, kind)
    return np.ascontiguousarray(made).view(np.uint8).reshape(rows, -1)


def placed(gpu: GPU, kind: Kind, blocks: np.ndarray) -> Matrix:
    return place(gpu, int(kind), blocks)


def upload_rows(gpu: GPU, x: np.ndarray) -> Rows:
    """Activations float32 [1, n] in all forms, made by the reference."""
    q, scale = reference.quantize_activations(x)
    sums = scale * q.reshape(*scale.shape, 32).sum(axis=2, dtype=np.int32).astype(np.float32)
    return Rows(*(Guarded.of(gpu, a).address for a in (x, q, np.stack([scale, sums], axis=-1))))


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
        self.outs = [Guarded.empty(gpu, (len(b),), np.float32) for b in self.blocks]
        self.kept = RowsOut.empty(gpu, 1, cols, int8=True)
        parts = [
            (placed(gpu, kind, b), out.address)
            for kind, b, out in zip(kinds, self.blocks, self.outs, strict=True)
        ]
        vectors = (Guarded.of(gpu, self.x).address, Guarded.of(gpu, self.norm).address)
        gpu.launch(project(gpu, *vectors, EPS, parts, keep=self.kept.rows, options=options))

    def check(self) -> None:
        kept = self.kept.read()
        check_rows(kept, reference.rms_norm(self.x, self.norm, EPS), 1e-6)
        for kind, weights, out in zip(self.kinds, self.blocks, self.outs, strict=True):
            expected = expected_product(kind, weights, kept[0], int8=self.int8)
            assert error(out.read(), expected) < TOLERANCE


# Rows that share a wave; rows of several tiles the last of which is short; 13 blocks of 32.
@pytest.mark.parametrize(
    ("kinds", "cols"),
    [(QUANTS + FLOATS, 256), (QUANTS + FLOATS, 4352), ((Kind.Q8_0, Kind.Q5_0, *FLOATS), 416)],
    ids=["short", "long", "odd"],
)
def test_every_type_times_a_normalised_vector(gpu: GPU, kinds: tuple[Kind, ...], cols: int) -> None:
    Products(gpu, kinds, cols, Options()).check()


def test_quantised_rows_times_floats(gpu: GPU) -> None:
    Products(gpu, QUANTS, 512, Options(int8=False)).check()


@pytest.mark.parametrize("kind", [Kind.Q5_K, Kind.BF16], ids=lambda kind: kind.name)
def test_rows_times_a_vector_are_added(gpu: GPU, kind: Kind) -> None:
    rng = np.random.default_rng(int(kind))
    x, blocks = rng.normal(size=(1, 512)).astype(np.float32), blocks_of(rng, kind, 37, 512)
    out = Guarded.empty(gpu, (37,), np.float32)
    matrix, vector = placed(gpu, kind, blocks), upload_rows(gpu, x)
    gpu.launch(project_rows(gpu, vector, matrix, out.address, add=False))
    first = out.read()
    assert error(first, expected_product(kind, blocks, x, int8=True)) < TOLERANCE
    gpu.launch(project_rows(gpu, vector, matrix, out.address))
    np.testing.assert_array_equal(out.read(), first + first)


def test_int8_rounds_as_division_does(gpu: GPU) -> None:
    """Halves go to even, at any scale; x of +-1 leaves the norm's weight as it is."""
    rng = np.random.default_rng(4)
    blocks = rng.normal(size=(64, 32))
    blocks[::2] = rng.integers(-126, 126, (32, 32)) + 0.5
    blocks[::2, 0] = 127
    powers = 2.0 ** np.linspace(60, -118, 32).round()  # values of a block are normal numbers
    norm = (blocks.reshape(32, 2, 32) * powers[:, None, None]).astype(np.float32).reshape(-1)
    x = np.where(rng.random(norm.size) < 0.5, 1, -1).astype(np.float32)
    kept = RowsOut.empty(gpu, 1, norm.size, int8=True)
    matrix = placed(gpu, Kind.F32, blocks_of(rng, Kind.F32, 1, norm.size))
    addresses = [Guarded.of(gpu, a).address for a in (x, norm, np.zeros(1, np.float32))]
    gpu.launch(project(gpu, *addresses[:2], 0.0, [(matrix, addresses[2])], keep=kept.rows))
    found = kept.read()
    np.testing.assert_array_equal(found[0][0], x * norm)
    check_rows(found, (x * norm)[None].astype(np.float64), 1e-6)


def test_zeros_stay_zeros(gpu: GPU) -> None:
    rng = np.random.default_rng(1)
    matrix = placed(gpu, Kind.Q4_K, blocks_of(rng, Kind.Q4_K, 8, 256))
    out = Guarded.empty(gpu, (8,), np.float32)
    x, norm = (Guarded.of(gpu, np.full(256, v, np.float32)).address for v in (0, 1))
    gpu.launch(project(gpu, x, norm, EPS, [(matrix, out.address)]))
    np.testing.assert_array_equal(out.read(), np.zeros(8, np.float32))


def test_tuning_changes_no_row_of_one_segment(gpu: GPU) -> None:
    rng = np.random.default_rng(2)
    matrix = placed(gpu, Kind.Q6_K, blocks_of(rng, Kind.Q6_K, 19, 1024))
    rows = upload_rows(gpu, rng.normal(size=(1, 1024)).astype(np.float32))
    seen = []
    for tuning in (Tuning(1, 1, 2), Tuning(2, 3, 4, held=0)):
        out = Guarded.empty(gpu, (19,), np.float32)
        options = Options(tuning=tuning)
        gpu.launch(project_rows(gpu, rows, matrix, out.address, add=False, options=options))
        seen.append(out.read())
    np.testing.assert_array_equal(*seen)


def test_early_groups_of_a_core_are_as_many_as_it_has_room_for(gpu: GPU) -> None:
    room = gpu.runtime.shared_bytes
    pair = Tuning(1, 2, 1, early=True)
    for stage, per_core in ((room // 4, 2), (room // 2 + 1024, 1)):
        fitting = fit(pair, gpu.runtime, 0, stage)
        assert fitting.per_core == per_core
        each = group_bytes(fitting, gpu.runtime, stage) + 1024
        assert per_core * each <= room + 1024 < (per_core + 1) * each
    assert fit(Tuning(1, 2, 1), gpu.runtime, 0, room // 2 + 1024).per_core == 2


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
    with pytest.raises(DeviceError, match="kept in all forms"):
        project(gpu, 0, 0, EPS, [(one, 0)], keep=Rows(256, 0, 0))


def test_groups_go_where_the_bytes_are() -> None:
    assert share_groups([100, 100, 1], [50, 50, 50], 21) == [10, 10, 1]
    assert share_groups([100, 1], [3, 4], 100) == [3, 4]
    assert share_groups([5, 5, 5], [9, 9, 9], 2) == [1, 1, 1]
