"""Products of one token over more weights than a cache holds, with what they should give."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from weights import U8, random_blocks, values_of

from fomoe.gguf.quants import GGMLType, row_bytes
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.matrices import ExpertLayout, Matrix
from fomoe.kernels.gpu.moe import MoEBuffers, experts_in, experts_out
from fomoe.kernels.gpu.products import Options, project_rows
from fomoe.kernels.gpu.step import Rows, picks
from fomoe.kernels.gpu.tuning import Tuning

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

POOL_ROWS = 512  # rows that are made and checked; the rest are copies of them
TOLERANCE = 1e-5


def quantised(x: F32) -> tuple[npt.NDArray[np.int8], F32]:
    """int8 [n] and (d, d * sum) [n / 32, 2] of float32 [n]."""
    groups = x.reshape(-1, 32)
    d = np.abs(groups).max(axis=1) / np.float32(127)
    q = np.rint(groups / d[:, None]).astype(np.int8)
    return q.reshape(-1), np.stack([d, d * q.sum(axis=1, dtype=np.float32)], axis=1)


def seen_by(kind: GGMLType, x: F32) -> F64:
    """The activations that a product with weights of that type multiplies."""
    if kind.is_float:
        return x.astype(np.float64)
    q, s = quantised(x)
    return q.astype(np.float64) * np.repeat(s[:, 0].astype(np.float64), 32)


def upload(gpu: GPU, array: npt.NDArray[np.generic]) -> int:
    """Place an array and return its address."""
    address = gpu.arena.take(array.nbytes)
    gpu.upload(address, array)
    return address


def upload_rows(gpu: GPU, x: F32) -> Rows:
    """Place activations in all forms."""
    q, s = quantised(x)
    return Rows(*(upload(gpu, a) for a in (x, q, s)))


def repeated(gpu: GPU, source: U8, nbytes: int) -> int:
    """Place `nbytes` of copies of `source` one after the other; returns the address."""
    address = gpu.arena.take(nbytes)
    first = min(nbytes, source.nbytes)
    gpu.upload(address, source.reshape(-1)[:first])
    while first < nbytes:
        more = min(first, nbytes - first)
        gpu.runtime.copy(address + first, address, more, gpu.stream)
        first += more
    gpu.runtime.synchronize(gpu.stream)
    return address


def difference(found: npt.NDArray[np.floating], expected: F64) -> float:
    """The largest difference over the largest value expected."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


class MatrixCase:
    """y = W h for one matrix of about `nbytes`.

    Attributes:
        tuning: of the product; None is the device's own.
    """

    def __init__(self, gpu: GPU, kind: GGMLType, cols: int, nbytes: int) -> None:
        rng = np.random.default_rng(int(kind))
        rows = max(1, nbytes // row_bytes(kind, cols))
        pool = random_blocks(rng, kind, min(rows, POOL_ROWS), cols)
        x = rng.standard_normal(cols, dtype=np.float32)
        self.name = f"{kind.name} {rows} x {cols}"
        self.nbytes = rows * row_bytes(kind, cols)
        self.tuning: Tuning | None = None
        self._gpu, self._rows = gpu, rows
        self._expected = values_of(kind, pool) @ seen_by(kind, x)
        self._matrix = Matrix(repeated(gpu, pool, self.nbytes), int(kind), rows, cols)
        self._h = upload_rows(gpu, x)
        self._y = gpu.arena.take(rows * 4)

    def launches(self) -> list[Launch]:
        """What is timed: four products."""
        options = Options(tuning=self.tuning)
        one = project_rows(self._gpu, self._h, self._matrix, self._y, add=False, options=options)
        return [one] * 4

    def check(self) -> float:
        """Return the error of the latest product, over all of its rows."""
        found = self._gpu.download(self._y, np.float32, self._rows)
        copies = -(-self._rows // len(self._expected))
        return difference(found, np.tile(self._expected, copies)[: self._rows])


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """An MoE layer: hidden size, expert width, shared width, experts per token."""

    hidden: int
    width: int
    shared: int
    top_k: int


class ExpertsCase:
    """The routed experts of several layers one after the other, so that none is in a cache.

    Attributes:
        part: what is timed: "in", "out" or "both".
        tunings: of experts in and experts out; None is the device's own.
    """

    def __init__(
        self, gpu: GPU, sizes: LayerSizes, types: tuple[GGMLType, GGMLType], nbytes: int
    ) -> None:
        inner, down = types
        self.part = "both"
        self.tunings: tuple[Tuning | None, Tuning | None] = (None, None)
        self._last: list[Launch] = []
        self._gpu, self._sizes, self._types = gpu, sizes, types
        self._layout = ExpertLayout((inner, inner, down), sizes.hidden, sizes.width)
        self._slot = -(-self._layout.nbytes // 256) * 256
        self._layers = max(2, -(-nbytes // (sizes.top_k * self._slot)))
        self._rng = np.random.default_rng(7)
        self._place()

    def _place(self) -> None:
        gpu, sizes, rng, (inner, down) = self._gpu, self._sizes, self._rng, self._types
        shapes = [(inner, sizes.width, sizes.hidden)] * 2 + [(down, sizes.hidden, sizes.width)]
        self._pool = [[random_blocks(rng, *shape) for shape in shapes] for _ in range(2)]
        count = self._layers * sizes.top_k
        self._slots = [gpu.arena.take(self._slot) for _ in range(count)]
        for i, slot in enumerate(self._slots):
            source = self._slots[i % 2]
            if i >= 2:
                gpu.runtime.copy(slot, source, self._layout.nbytes, gpu.stream)
                continue
            for offset, part in zip(self._layout.offsets, self._pool[i], strict=True):
                gpu.upload(slot + offset, part)
        self._shared = random_blocks(rng, down, sizes.hidden, sizes.shared)
        shared_address = repeated(gpu, self._shared, self._layers * self._shared.nbytes)
        self._shared_downs = [
            Matrix(shared_address + i * self._shared.nbytes, int(down), sizes.hidden, sizes.shared)
            for i in range(self._layers)
        ]
        self._weights = rng.uniform(0, 1, sizes.top_k).astype(np.float32)
        self._place_vectors()

    def _place_vectors(self) -> None:
        gpu, sizes, rng = self._gpu, self._sizes, self._rng
        self._vectors = {
            name: rng.standard_normal(n, dtype=np.float32)
            for name, n in (
                ("h", sizes.hidden), ("gate", sizes.shared), ("up", sizes.shared), ("scale", 1),
                ("x", sizes.hidden),
            )
        }  # fmt: skip
        at = {name: upload(gpu, v) for name, v in self._vectors.items() if name not in ("h", "x")}
        self._inner = gpu.arena.take(4 * sizes.top_k * sizes.width)
        self._x = upload(gpu, self._vectors["x"])
        h = upload_rows(gpu, self._vectors["h"])
        self._buffers = MoEBuffers(h, 0, at["gate"], at["up"], at["scale"], self._inner)
        self._picks = [upload(gpu, self._picks_of(i)) for i in range(self._layers)]

    def _picks_of(self, layer: int) -> npt.NDArray[np.void]:
        k = self._sizes.top_k
        slots = np.array(self._slots[layer * k : layer * k + k], np.uint64)
        made = np.zeros(1, picks(k))
        made["address"][0] = slots + np.array(self._layout.offsets, np.uint64)[:, None]
        made["weight"][0], made["id"][0] = self._weights, np.arange(k)
        return made

    @property
    def name(self) -> str:
        """Types and what is timed."""
        inner, down = self._types
        return f"experts {self.part}: {inner.name}, down {down.name}, {self._layers} layers"

    @property
    def nbytes(self) -> int:
        """Bytes of weights that the launches read."""
        gate, up, down = self._layout.part_bytes
        parts = {"in": gate + up, "out": down, "both": gate + up + down}
        shared = 0 if self.part == "in" else self._shared.nbytes
        return self._layers * (self._sizes.top_k * parts[self.part] + shared)

    def launches(self) -> list[Launch]:
        """What is timed: all layers."""
        made = []
        first, second = (Options(tuning=tuning) for tuning in self.tunings)
        for picked, shared in zip(self._picks, self._shared_downs, strict=True):
            k, out = self._sizes.top_k, self._buffers
            if self.part != "out":
                args = (self._layout, (k, picked), out)
                made.append(experts_in(self._gpu, *args, options=first))
            if self.part != "in":
                args = (self._layout, (k, picked), shared, out, self._x)
                made.append(experts_out(self._gpu, *args, options=second))
        self._last = made
        return made

    def check(self) -> float:
        """Return the error of the last layer's launches: of `inner`, of x, or the greater one."""
        first = (self._layers - 1) * self._sizes.top_k
        order = [(first + e) % 2 for e in range(self._sizes.top_k)]
        expected = self._inners[order]
        found = self._gpu.download(self._inner, np.float32, expected.shape)
        errors = {"in": difference(found, expected)}
        if self.part != "in":
            errors["out"] = self._out_error(found, order)
        return max(errors.values()) if self.part == "both" else errors[self.part]

    @cached_property
    def _inners(self) -> F64:
        """What each expert of the pool makes of h."""
        inner, _ = self._types
        h = seen_by(inner, self._vectors["h"])
        gate_up = [[values_of(inner, part) @ h for part in pool[:2]] for pool in self._pool]
        return np.array([_silu(gate) * up for gate, up in gate_up])

    @cached_property
    def _downs(self) -> list[F64]:
        """Values of down of each expert of the pool, then of the shared expert."""
        _, down = self._types
        return [values_of(down, part) for part in (*(p[2] for p in self._pool), self._shared)]

    def _out_error(self, inner: F32, order: list[int]) -> float:
        gpu, vectors, (_, down) = self._gpu, self._vectors, self._types
        gpu.upload(self._x, vectors["x"])
        gpu.launch(self._last[-1])
        found = gpu.download(self._x, np.float32, self._sizes.hidden)
        total = np.zeros(self._sizes.hidden)
        for i, weight, row in zip(order, self._weights, inner, strict=True):
            total += float(weight) * (self._downs[i] @ seen_by(down, row))
        mid = (_silu(vectors["gate"].astype(np.float64)) * vectors["up"]).astype(np.float32)
        shared = self._downs[-1] @ seen_by(down, mid)
        scale = 1 / (1 + np.exp(-float(vectors["scale"][0])))
        return difference(found, total + shared * scale + vectors["x"])


def _silu(x: F64) -> F64:
    return x / (1 + np.exp(-x))
