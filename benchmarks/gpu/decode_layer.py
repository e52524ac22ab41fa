"""DeltaNet decode layers one after the other, over more weights than a cache holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm

import numpy as np
import numpy.typing as npt
from product_cases import repeated, upload, upload_rows
from weights import random_blocks

from fomoe.gguf.quants import GGMLType, row_bytes
from fomoe.kernels.gpu.arena import ALIGN, aligned
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.matrices import ExpertLayout, Matrix
from fomoe.kernels.gpu.moe import (
    MoEBuffers,
    Resident,
    SharedMatrices,
    experts_in,
    experts_out,
    scores,
)
from fomoe.kernels.gpu.products import Options, project, project_rows
from fomoe.kernels.gpu.sequence import DeltaCall, DeltaInputs, DeltaWeights, delta
from fomoe.kernels.gpu.state import StateLayout, channels
from fomoe.kernels.gpu.step import STEP, picks
from fomoe.kernels.gpu.tuning import Kernel, Tuning
from fomoe.model.spec import AttentionSpec, DeltaSpec

Key = tuple[Kernel, GGMLType]
Part = str  # one of PARTS, or "delta", whose launch is not tuned
PARTS = ("mixer in", "mixer out", "scores", "experts in", "experts out")
EPS, POOL_ROWS, STATES = 1e-6, 64, 16
_NO_ATTENTION = AttentionSpec(n_heads=1, n_kv_heads=1, head_dim=8, rope_dims=8, rope_base=1e4)


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a layer."""

    name: str
    hidden: int
    delta: DeltaSpec
    experts: int
    width: int
    shared: int
    top_k: int

    @property
    def mixer(self) -> tuple[int, ...]:
        """Rows of what multiplies the mixer's input: qkv, z, alpha, beta."""
        return channels(self.delta), self.delta.inner, self.delta.n_v_heads, self.delta.n_v_heads


def _delta_of(heads: int) -> DeltaSpec:
    return DeltaSpec(n_k_heads=16, n_v_heads=heads, key_dim=128, value_dim=128, conv_width=4)


MODELS = (
    Model("397B", 4096, _delta_of(64), 512, 1024, 1024, 10),
    Model("35B", 2048, _delta_of(32), 256, 512, 512, 8),
)


@dataclass(frozen=True, slots=True)
class Types:
    """Types of a layer's weights: the mixer's, gate and up, down; the router is float32."""

    mixer: GGMLType
    inner: GGMLType
    down: GGMLType


@dataclass(frozen=True, slots=True)
class Work:
    """A launch to be made: its dense matrices and other bytes that it moves."""

    part: Part
    matrices: Sequence[Matrix]
    launch: Callable[[Options], Launch]
    more_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of weights and state that it moves."""
        return sum(m.nbytes for m in self.matrices) + self.more_bytes


class Weights:
    """Matrices one behind the other in a region of valid blocks, at its end from its start."""

    def __init__(self, gpu: GPU, nbytes: int) -> None:
        self._gpu, self._nbytes = gpu, nbytes
        self._regions: dict[GGMLType, int] = {}
        self._next: dict[GGMLType, int] = {}

    def matrix(self, kind: GGMLType, rows: int, cols: int) -> Matrix:
        """Return the next matrix."""
        if kind not in self._regions:
            blocks = random_blocks(np.random.default_rng(int(kind)), kind, POOL_ROWS, 4096)
            self._regions[kind] = repeated(self._gpu, blocks, self._nbytes)
        step = lcm(ALIGN, kind.block_bytes)
        size = -(-rows * row_bytes(kind, cols) // step) * step
        at = self._next.get(kind, 0)
        at = at if at + size <= self._nbytes else 0
        self._next[kind] = at + size
        return Matrix(self._regions[kind] + at, int(kind), rows, cols)


class DecodeLayers:
    """Layers of one model's sizes; each call of `launches` takes weights where the last one ended.

    Only times are taken: activations are valid numbers that nobody checks, and results go where no
    launch reads, so that they stay valid.
    """

    def __init__(self, gpu: GPU, model: Model, types: Types, nbytes: int) -> None:
        self.model, self.types, self.nbytes = model, types, nbytes
        self._gpu, self._weights = gpu, Weights(gpu, nbytes)
        self._layout = ExpertLayout(
            (types.inner, types.inner, types.down), model.hidden, model.width
        )
        rng = np.random.default_rng(3)

        def vector(n: int) -> int:
            return upload(gpu, rng.standard_normal(n, dtype=np.float32))

        self._x, self._norm, self._sum = (vector(model.hidden) for _ in range(3))
        self._y = [vector(rows) for rows in model.mixer]
        self._mixed = upload_rows(gpu, rng.standard_normal(model.delta.inner, dtype=np.float32))
        self._deltas = self._make_deltas(vector)
        rows = upload_rows(gpu, rng.standard_normal(model.hidden, dtype=np.float32))
        self._scores = vector(model.experts)
        sizes = model.experts, model.shared, model.shared, 1, model.top_k * model.width
        self._buffers = MoEBuffers(rows, *(vector(n) for n in sizes))

    def _make_deltas(self, vector: Callable[[int], int]) -> list[Launch]:
        """The mixer's launch for one state after the other, whose memories fade."""
        gpu, spec = self._gpu, self.model.delta
        layout = StateLayout.of(("delta",), spec, _NO_ATTENTION, 32, "f16")
        n, taps = spec.n_v_heads, channels(spec) * spec.conv_width
        fading = upload(gpu, np.full(n, -1, np.float32))
        weights = DeltaWeights(vector(taps), fading, vector(n), vector(spec.value_dim), EPS)
        out = self._mixed._replace(x=0)
        call = DeltaCall(weights, DeltaInputs(*self._y), layout.layers[0], out)
        made = []
        for _ in range(STATES):
            state = upload(gpu, np.zeros(layout.nbytes, np.uint8))
            step = upload(gpu, np.array((0, 9, 1, 0, state), STEP))
            made.append(delta(gpu, step, spec, call))
        return made

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        """Addresses of a slot table and of picks for one layer after the other."""
        gpu, model, rng = self._gpu, self.model, np.random.default_rng(5)
        slot = np.zeros(aligned(self._layout.nbytes), np.uint8)
        shapes = [(model.width, model.hidden)] * 2 + [(model.hidden, model.width)]
        for qtype, shape, at in zip(self._layout.types, shapes, self._layout.offsets, strict=True):
            blocks = random_blocks(rng, GGMLType(qtype), *shape).reshape(-1)
            slot[at : at + blocks.size] = blocks
        count = -(-self.nbytes // (slot.size * model.top_k)) * model.top_k
        first = repeated(gpu, slot, count * slot.size)
        slots = np.array([first + i * slot.size for i in range(count)], np.uint64)
        # The scores and so the chosen experts are the same in each layer; they lie in other slots.
        return [self._placed(group) for group in slots.reshape(-1, model.top_k)]

    def _placed(self, slots: npt.NDArray[np.uint64]) -> tuple[int, int]:
        gpu, model = self._gpu, self.model
        values = gpu.download(self._buffers.scores, np.float32, model.experts)
        chosen = np.sort(np.argsort(-values, kind="stable")[: model.top_k])
        table, made = np.resize(slots, model.experts), np.zeros(1, picks(model.top_k))
        table[chosen] = slots
        made["address"][0] = slots + np.array(self._layout.offsets, np.uint64)[:, None]
        made["weight"][0], made["id"][0] = 1 / model.top_k, chosen
        return upload(gpu, table), upload(gpu, made)

    def keys(self) -> dict[Part, Key]:
        """What the tuning of each part is looked up by."""
        t = self.types
        return {
            "mixer in": ("project", t.mixer),
            "mixer out": ("project_rows", t.mixer),
            "scores": ("project", GGMLType.F32),
            "experts in": ("experts_in", t.inner),
            "experts out": ("experts_out", t.down),
        }

    def launches(
        self, tuning: Mapping[Part, Tuning], only: Part | None = None
    ) -> tuple[list[Launch], int]:
        """Return launches over `nbytes` of weights at least, and the bytes that they read."""
        made: list[Launch] = []
        total = 0
        for work in self._work():
            if total >= self.nbytes and (only or work.part == PARTS[0]):
                break
            if only in (None, work.part):
                made.append(work.launch(Options(tuning=tuning.get(work.part))))
                total += work.nbytes
        return made, total

    def _work(self) -> Iterator[Work]:
        layer = 0
        while True:
            mixer = self._deltas[layer % STATES]
            yield from self._layer(self._places[layer % len(self._places)], mixer)
            layer += 1

    def _layer(self, place: tuple[int, int], mixer: Launch) -> Iterator[Work]:
        gpu, m, t, take = self._gpu, self.model, self.types, self._weights.matrix
        inputs = [take(t.mixer, rows, m.hidden) for rows in m.mixer]
        parts = list(zip(inputs, self._y, strict=True))
        x, norm = self._x, self._norm
        yield Work("mixer in", inputs, lambda o: project(gpu, x, norm, EPS, parts, options=o))
        state = 2 * 4 * m.delta.n_v_heads * m.delta.key_dim * m.delta.value_dim
        yield Work("delta", [], lambda o: mixer, state)
        out = take(t.mixer, m.hidden, m.delta.inner)
        rows = self._mixed
        yield Work("mixer out", [out], lambda o: project_rows(gpu, rows, out, self._sum, options=o))
        router = take(GGMLType.F32, m.experts, m.hidden)
        shared = SharedMatrices(
            take(t.mixer, m.shared, m.hidden),
            take(t.mixer, m.shared, m.hidden),
            take(GGMLType.F32, 1, m.hidden),
        )
        aside = replace(self._buffers, scores=self._scores)
        yield Work(
            "scores", [router, shared.gate, shared.up, shared.scale],
            lambda o: scores(gpu, x, (norm, EPS), router, shared, aside, options=o),
        )  # fmt: skip
        yield from self._experts(*place)

    def _experts(self, table: int, at: int) -> Iterator[Work]:
        gpu, m, b, layout = self._gpu, self.model, self._buffers, self._layout
        down = self._weights.matrix(self.types.down, m.hidden, m.shared)
        gate_up = sum(layout.part_bytes[:2]) * m.top_k
        resident = Resident(table, m.experts)
        yield Work(
            "experts in", [],
            lambda o: experts_in(gpu, layout, (m.top_k, at), b, resident=resident, options=o),
            gate_up,
        )  # fmt: skip
        yield Work(
            "experts out", [down],
            lambda o: experts_out(gpu, layout, (m.top_k, at), down, b, self._sum, options=o),
            layout.part_bytes[2] * m.top_k,
        )  # fmt: skip
