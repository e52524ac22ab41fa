"""Router scores, routed experts and their sum by the GPU kernels, against NumPy float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gpu_arrays import Guarded, RowsOut, error
from support.emulated_gpu import gpu_under_test
from support.random_blocks import random_matrix

from fomoe.errors import DeviceError
from fomoe.kernels import reference
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.matrices import ExpertLayout, place
from fomoe.kernels.gpu.moe import (
    MoEBuffers,
    Resident,
    SharedMatrices,
    Turn,
    experts_in,
    experts_out,
    scores,
    shared_out,
)
from fomoe.kernels.gpu.products import Options
from fomoe.kernels.gpu.step import Rows, picks

EPS = 1e-6
NO_BUFFERS = MoEBuffers(Rows(0, 0, 0), 0, 0, 0, 0, 0)
F32 = np.ndarray


@pytest.fixture(scope="module", params=[32, 64], ids=["wave32", "wave64"])
def gpu(request: pytest.FixtureRequest) -> Iterator[GPU]:
    with gpu_under_test(request.param) as opened:
        yield opened


def blocks_of(rng: np.random.Generator, kind: Kind, rows: int, cols: int) -> np.ndarray:
    made = random_matrix(rng, (rows, cols), cols**-0.5, kind)
    return np.ascontiguousarray(made).view(np.uint8).reshape(rows, -1)


@dataclass(frozen=True)
class Shape:
    """Sizes and types of a layer."""

    hidden: int
    width: int
    shared: int
    experts: int
    top_k: int
    inner: Kind  # of gate and up
    down: Kind
    shared_down: Kind


class Layer:
    """A layer of random weights on a device, and the float64 twin of each launch."""

    def __init__(self, gpu: GPU, shape: Shape, options: Options) -> None:
        rng = np.random.default_rng(shape.hidden + shape.width)
        self.gpu, self.shape, self.options = gpu, shape, options
        hidden, width, n = shape.hidden, shape.width, shape.experts
        self.x = rng.normal(size=(1, hidden)).astype(np.float32)
        self.norm = rng.normal(1, 0.2, hidden).astype(np.float32)
        self.router = rng.normal(0, 1.5 * hidden**-0.5, (n, hidden)).astype(np.float32)
        self.scale = rng.normal(0, hidden**-0.5, (1, hidden)).astype(np.float32)
        self.shared = [
            blocks_of(rng, Kind.Q8_0, shape.shared, hidden),
            blocks_of(rng, Kind.Q8_0, shape.shared, hidden),
            blocks_of(rng, shape.shared_down, hidden, shape.shared),
        ]
        kinds = (shape.inner, shape.inner, shape.down)
        self.layout = ExpertLayout((int(kinds[0]), int(kinds[1]), int(kinds[2])), hidden, width)
        sizes = ((width, hidden), (width, hidden), (hidden, width))
        self.experts = [
            [blocks_of(rng, kind, *size) for kind, size in zip(kinds, sizes, strict=True)]
            for _ in range(n)
        ]
        self._upload()

    def _upload(self) -> None:
        gpu, shape = self.gpu, self.shape
        as_bytes = [a.view(np.uint8) for a in (self.router, self.scale)]
        self.matrices = SharedMatrices(
            place(gpu, int(Kind.Q8_0), self.shared[0]),
            place(gpu, int(Kind.Q8_0), self.shared[1]),
            place(gpu, int(Kind.F32), as_bytes[1]),
        )
        self.router_matrix = place(gpu, int(Kind.F32), as_bytes[0])
        self.shared_down = place(gpu, int(shape.shared_down), self.shared[2])
        self.table = np.zeros(shape.experts, np.uint64)
        for i, expert in enumerate(self.experts):
            slot = gpu.arena.take(self.layout.nbytes)
            for offset, part in zip(self.layout.offsets, expert, strict=True):
                gpu.upload(slot + offset, part)
            self.table[i] = slot
        sizes = {"scores": shape.experts, "gate": shape.shared, "up": shape.shared, "scale": 1}
        self.outs = {name: Guarded.empty(gpu, (n,), np.float32) for name, n in sizes.items()}
        self.inner = Guarded.empty(gpu, (shape.top_k, shape.width), np.float32)
        self.h = RowsOut.empty(gpu, 1, shape.hidden, int8=True)
        self.late = Guarded.empty(gpu, (1,), np.uint32)
        self.buffers = MoEBuffers(
            self.h.rows,
            *(self.outs[name].address for name in ("scores", "gate", "up", "scale")),
            self.inner.address,
            self.late.address,
        )

    def run_scores(self) -> None:
        x, norm = (Guarded.of(self.gpu, a).address for a in (self.x, self.norm))
        launch = scores(
            self.gpu, x, (norm, EPS), self.router_matrix, self.matrices, self.buffers,
            options=self.options,
        )  # fmt: skip
        self.gpu.launch(launch)

    def picks_of(self, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        made = np.zeros(1, picks(self.shape.top_k))
        offsets = np.array(self.layout.offsets, np.uint64)
        made["address"][0] = self.table[ids] + offsets[:, None]
        made["weight"][0], made["id"][0] = weights, ids
        return made

    def rounded(self, h: F32) -> np.ndarray:
        """The activations as a quantised product sees them."""
        if not self.options.int8:
            return h.astype(np.float64)
        return reference.restore_activations(*reference.quantize_activations(h))

    def product(self, kind: Kind, blocks: np.ndarray, h: F32) -> np.ndarray:
        wide = h.astype(np.float64) if kind in (Kind.F32, Kind.F16) else self.rounded(h)
        return (wide @ reference.dequantize(int(kind), blocks).astype(np.float64).T)[0]

    def expected_inner(self, ids: np.ndarray, h: F32) -> np.ndarray:
        kind = self.shape.inner
        return np.array(
            [
                reference.silu_mul(*(self.product(kind, self.experts[i][m], h) for m in (0, 1)))
                for i in ids
            ]
        )

    def expected_sum(self, ids: np.ndarray, weights: np.ndarray, inner: F32) -> np.ndarray:
        total = np.zeros(self.shape.hidden)
        for row, i, weight in zip(inner, ids, weights, strict=True):
            total += float(weight) * self.product(self.shape.down, self.experts[i][2], row[None])
        return total

    def expected_out(self, ids: np.ndarray, weights: np.ndarray, inner: F32) -> np.ndarray:
        total = self.expected_sum(ids, weights, inner)
        gate, up, scale = (self.outs[name].read() for name in ("gate", "up", "scale"))
        mid = reference.silu_mul(gate, up).astype(np.float32)[None]
        shared = self.product(self.shape.shared_down, self.shared[2], mid)
        return total + shared * reference.sigmoid(scale) + self.x[0]


def top_of(values: F32, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids by score, then lower id, in ascending order, with their softmax over the chosen."""
    ids = np.sort(np.argsort(-values, kind="stable")[:k]).astype(np.int32)
    mass = np.exp(values[ids].astype(np.float64) - values.max())
    return ids, (mass / mass.sum()).astype(np.float32)


# float32 sums of products of int8; a value of `inner` that float32 rounds to the other side of a
# half changes an int8 by one, 1/127 of the largest of its 32, in one of `width` terms.
SUM, ROUNDED = 3e-6, 2e-3

WIDE = Shape(512, 256, 256, 12, 5, Kind.Q4_K, Kind.Q6_K, Kind.Q8_0)
ODD = Shape(96, 32, 160, 9, 3, Kind.Q8_0, Kind.Q5_0, Kind.F16)
FLOAT = Shape(256, 64, 96, 8, 2, Kind.IQ4_XS, Kind.F16, Kind.Q5_0)


@pytest.mark.parametrize(
    ("shape", "int8"),
    [(WIDE, True), (ODD, True), (FLOAT, False)],
    ids=["wide", "odd", "float32"],
)
def test_a_layer(gpu: GPU, shape: Shape, int8: bool) -> None:
    layer = Layer(gpu, shape, Options(int8=int8))
    layer.run_scores()
    h = np.asarray(layer.h.x.read())
    assert error(h, reference.rms_norm(layer.x, layer.norm, EPS)) < 1e-6
    assert error(layer.outs["scores"].read(), h[0] @ layer.router.T.astype(np.float64)) < SUM
    assert error(layer.outs["scale"].read(), h[0] @ layer.scale.T.astype(np.float64)) < SUM
    for name, blocks in zip(("gate", "up"), layer.shared, strict=False):
        assert error(layer.outs[name].read(), layer.product(Kind.Q8_0, blocks, h)) < SUM

    ids, weights = top_of(layer.outs["scores"].read(), shape.top_k)
    picked = Guarded.of(gpu, layer.picks_of(ids, weights))
    k = shape.top_k
    gpu.launch(
        experts_in(gpu, layer.layout, (k, picked.address), layer.buffers, options=layer.options)
    )
    inner = layer.inner.read()
    assert error(inner, layer.expected_inner(ids, h)) < 1e-5

    x = Guarded.of(gpu, layer.x)
    launch = experts_out(
        gpu, layer.layout, (k, picked.address), layer.shared_down, layer.buffers, x.address,
        options=layer.options,
    )  # fmt: skip
    gpu.launch(launch)
    whole = x.read()
    assert error(whole[0], layer.expected_out(ids, weights, inner)) < ROUNDED if int8 else SUM

    sums, x = Guarded.empty(gpu, (1, shape.hidden), np.float32), Guarded.of(gpu, layer.x)
    routed = (k, picked.address), None, layer.buffers, sums.address
    gpu.launch(experts_out(gpu, layer.layout, *routed, options=layer.options))
    rest = sums.address, layer.shared_down, layer.buffers, x.address
    gpu.launch(shared_out(gpu, layer.layout, *rest, options=layer.options))
    assert error(sums.read()[0], layer.expected_sum(ids, weights, inner)) < ROUNDED
    np.testing.assert_array_equal(x.read(), whole)

    chosen = Guarded.empty(gpu, (1,), picks(k))
    table = Guarded.of(gpu, layer.table)
    launch = experts_in(
        gpu, layer.layout, (k, chosen.address), layer.buffers,
        resident=Resident(table.address, shape.experts), options=layer.options,
    )  # fmt: skip
    gpu.launch(launch)
    got, wanted = chosen.read(), layer.picks_of(ids, weights)
    np.testing.assert_array_equal(got["id"], wanted["id"])
    np.testing.assert_array_equal(got["address"], wanted["address"])
    np.testing.assert_allclose(got["weight"], wanted["weight"], rtol=1e-6)
    np.testing.assert_array_equal(layer.inner.read(), inner)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_part_of_a_token_s_experts(gpu: GPU, count: int) -> None:
    """What has no address is neither read nor written nor added, whatever its weight."""
    layer = Layer(gpu, ODD, Options())
    layer.run_scores()
    ids, weights = top_of(layer.outs["scores"].read(), ODD.top_k)
    made = layer.picks_of(ids, weights)
    made["address"][0][:, count:] = 0
    picked, x = Guarded.of(gpu, made), Guarded.of(gpu, layer.x)
    rest = np.full((ODD.top_k, ODD.width), np.nan, np.float32)
    gpu.upload(layer.inner.address, rest)
    part = Options(partial=True)
    k_and_picks = ODD.top_k, picked.address
    gpu.launch(experts_in(gpu, layer.layout, k_and_picks, layer.buffers, options=part))
    inner, h = layer.inner.read(), np.asarray(layer.h.x.read())
    assert np.isnan(inner[count:]).all()
    if count:
        assert error(inner[:count], layer.expected_inner(ids[:count], h)) < 1e-5
    args = k_and_picks, layer.shared_down, layer.buffers, x.address
    gpu.launch(experts_out(gpu, layer.layout, *args, options=part))
    expected = layer.expected_out(ids[:count], weights[:count], inner[:count])
    assert error(x.read()[0], expected) < ROUNDED


@pytest.mark.parametrize("chooses", [False, True], ids=["told", "chooses"])
@pytest.mark.parametrize("late", [0b010, 0b101, 0b000, 0b111], ids=bin)
def test_experts_in_two_turns(gpu: GPU, late: int, *, chooses: bool) -> None:
    """The first reads nothing of late experts, the second does the rest: the bits of one launch."""
    layer = Layer(gpu, ODD, Options())
    layer.run_scores()
    k = ODD.top_k
    ids, weights = top_of(layer.outs["scores"].read(), k)
    wanted = Guarded.of(gpu, layer.picks_of(ids, weights))
    table = Guarded.of(gpu, layer.table)
    resident = Resident(table.address, ODD.experts)
    args = {"resident": resident} if chooses else {}
    gpu.launch(experts_in(gpu, layer.layout, (k, wanted.address), layer.buffers, **args))
    inner, picked = layer.inner.read(), wanted.read()

    is_late = np.array([late >> i & 1 for i in range(k)], np.bool_)
    made, unknown = picked.copy(), layer.table.copy()
    made["address"][0][:, is_late] = unknown[ids[is_late]] = 0  # what nobody may read
    picks_in_turns = Guarded.of(gpu, made)
    layer.inner.clear()
    sentinels = layer.inner.read()
    gpu.upload(layer.late.address, np.array([late], np.uint32))
    gpu.upload(table.address, unknown)
    in_turns = gpu, layer.layout, (k, picks_in_turns.address), layer.buffers
    gpu.launch(experts_in(*in_turns, turn=Turn.HITS, **args))
    first = layer.inner.read()
    np.testing.assert_array_equal(first[~is_late], inner[~is_late])
    np.testing.assert_array_equal(first[is_late], sentinels[is_late])

    gpu.upload(table.address, layer.table)
    gpu.launch(experts_in(*in_turns, turn=Turn.LATE, resident=resident))
    np.testing.assert_array_equal(layer.inner.read(), inner)
    np.testing.assert_array_equal(picks_in_turns.read(), picked)


def test_routed_sum_is_a_chain_of_fma_in_ascending_id(gpu: GPU) -> None:
    """With weights that differ by 2^20 the order of the sum shows in its last bits."""
    layer = Layer(gpu, ODD, Options())
    layer.run_scores()
    ids = np.array([1, 4, 7], np.int32)
    single = []
    for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (2.0**20, 1, -(2.0**20))):
        picked = Guarded.of(gpu, layer.picks_of(ids, np.array(weights, np.float32)))
        gpu.launch(experts_in(gpu, layer.layout, (3, picked.address), layer.buffers))
        x = Guarded.of(gpu, np.zeros_like(layer.x))
        args = (3, picked.address), layer.shared_down, layer.buffers, x.address
        gpu.upload(layer.outs["scale"].address, np.array([-np.inf], np.float32))
        gpu.launch(experts_out(gpu, layer.layout, *args))
        single.append(x.read()[0])
    chain = np.zeros(ODD.hidden, np.float32)
    for weight, part in zip((2.0**20, 1, -(2.0**20)), single, strict=False):
        chain = (weight * part.astype(np.float64) + chain).astype(np.float32)
    np.testing.assert_array_equal(single[3], chain)


def test_layouts_that_no_kernel_has_are_refused(gpu: GPU) -> None:
    with pytest.raises(DeviceError, match="an expert is of type Q2_K"):
        ExpertLayout((int(Kind.Q2_K), int(Kind.Q2_K), int(Kind.Q3_K)), 256, 256)
    with pytest.raises(DeviceError, match="48 x 256"):
        ExpertLayout((0, 0, 0), 256, 48)
    mixed = ExpertLayout((int(Kind.Q4_K), int(Kind.Q6_K), int(Kind.Q6_K)), 256, 256)
    with pytest.raises(DeviceError, match="gate Q4_K and up Q6_K"):
        experts_in(gpu, mixed, (2, 0), NO_BUFFERS)
    layout = ExpertLayout((int(Kind.F32), int(Kind.F32), int(Kind.F32)), 256, 256)
    with pytest.raises(DeviceError, match="turns of 33 experts: 32 is the most"):
        experts_in(gpu, layout, (33, 0), NO_BUFFERS, turn=Turn.HITS)


def test_parts_of_a_slot_are_aligned() -> None:
    layout = ExpertLayout((int(Kind.Q5_0), int(Kind.Q5_0), int(Kind.Q8_0)), 96, 32)
    assert layout.offsets == (0, 2304, 4608)  # 32 * 66 = 2112 bytes each
    assert layout.nbytes == 4608 + 96 * 34
