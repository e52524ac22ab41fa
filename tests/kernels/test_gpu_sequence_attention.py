"""Attention layers on a GPU, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from gpu_arrays import Array, Guarded, RowsOut, check_rows, run, step_block
from support.emulated_gpu import gpu_under_test

from fomoe.errors import DeviceError
from fomoe.kernels import reference
from fomoe.kernels.gpu import sequence
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.state import StateLayout
from fomoe.kernels.gpu.step import Rows
from fomoe.model.spec import AttentionSpec, DeltaSpec

EPS = 1e-6
# float32 sums of head_dim and of the context, angles of 2^-32 of a turn.
TOLERANCE = 1e-5
# Keys and values that differ in the last bit of float32 may round to different halves.
HALF_TOLERANCE = 3e-4
# Queries are rounded to half before scores of about ten, weights after.
TILE_TOLERANCE = 1e-3
DELTA = DeltaSpec(n_k_heads=1, n_v_heads=1, key_dim=16, value_dim=16, conv_width=4)


def spec_of(heads: int, kv_heads: int, dim: int, rotated: int, base: float = 1e7) -> AttentionSpec:
    return AttentionSpec(
        n_heads=heads, n_kv_heads=kv_heads, head_dim=dim, rope_dims=rotated, rope_base=base
    )


@dataclass(frozen=True)
class Layer:
    """Norms, a cache of `past` positions and the inputs of some tokens after it."""

    spec: AttentionSpec
    kv_dtype: str
    past: int
    keys: Array  # [past, kv heads, dim]
    values: Array
    q: Array  # [T, heads, 2, dim]
    k: Array
    v: Array
    q_norm: Array
    k_norm: Array

    @classmethod
    def random(cls, spec: AttentionSpec, kv_dtype: str, past: int, tokens: int) -> Layer:
        rng = np.random.default_rng(past * 100 + tokens)

        def floats(*shape: int) -> Array:
            return rng.standard_normal(shape, dtype=np.float32)

        kv = spec.n_kv_heads, spec.head_dim
        cached = np.float16 if kv_dtype == "f16" else np.float32
        keys, values = floats(past, *kv).astype(cached), floats(past, *kv).astype(cached)
        return cls(
            spec, kv_dtype, past, keys, values,
            floats(tokens, spec.n_heads, 2, spec.head_dim),
            floats(tokens, *kv), floats(tokens, *kv),
            1.5 + floats(spec.head_dim) / 4, 1.5 + floats(spec.head_dim) / 4,
        )  # fmt: skip

    def cache(self) -> tuple[Array, Array]:
        """Keys and values [past + T, ...] after the tokens."""
        k = reference.head_rms_norm(self.k, self.k_norm, EPS).astype(np.float32)
        k = self._rotated(k).astype(self.keys.dtype)
        return np.concatenate([self.keys, k]), np.concatenate(
            [self.values, self.v.astype(self.values.dtype)]
        )

    def expected(self) -> Array:
        """Rows of all tokens in float64."""
        q = reference.head_rms_norm(self.q[:, :, 0], self.q_norm, EPS).astype(np.float32)
        out = reference.attention(self._rotated(q).astype(np.float32), *self.cache(), self.past)
        gate = np.ascontiguousarray(self.q[:, :, 1])
        return (out * reference.sigmoid(gate)).reshape(len(q), -1)

    def _rotated(self, x: Array) -> Array:
        positions = (self.past + np.arange(len(x))).astype(np.int32)
        return reference.rope(x, positions, self.spec.rope_dims, self.spec.rope_base)


class Bench:
    """A layer on a GPU with a state of its own, in a cache that is larger than it needs."""

    def __init__(self, gpu: GPU, layer: Layer, int8: bool) -> None:
        self.gpu, self.layer, self.int8 = gpu, layer, int8
        self.ctx = layer.past + len(layer.q) + 40
        layout = StateLayout.of(("delta", "attention"), DELTA, layer.spec, self.ctx, layer.kv_dtype)
        place = layout.layers[1]
        assert isinstance(place, sequence.KVPlace)
        self.place = place
        whole = np.full(layout.nbytes, 0xFF, np.uint8)  # NaNs, which must not reach a result
        self._positions = (self.ctx + 31) // 32 * 32
        keys, values = self._views(whole)
        keys[: layer.past] = layer.keys
        for position in range(layer.past):
            values[position // 32, :, :, position % 32] = layer.values[position]
        self.state = Guarded.of(gpu, whole)
        turns = sequence.rope_turns(layer.spec)
        tensors = (layer.q_norm, layer.k_norm, turns)
        self.weights = sequence.AttendWeights(*(Guarded.of(gpu, a).address for a in tensors), EPS)

    def _views(self, whole: Array) -> tuple[Array, Array]:
        s, dtype = self.layer.spec, self.layer.keys.dtype
        size = self._positions * s.n_kv_heads * s.head_dim
        keys = whole[self.place.keys :][: size * dtype.itemsize].view(dtype)
        values = whole[self.place.values :][: size * dtype.itemsize].view(dtype)
        return keys.reshape(-1, s.n_kv_heads, s.head_dim), values.reshape(
            -1, s.n_kv_heads, s.head_dim, 32
        )

    def _call(self, first: int, count: int, out: Rows) -> sequence.AttendCall:
        rows = slice(first, first + count)
        inputs = (Guarded.of(self.gpu, a[rows]).address for a in self._inputs())
        return sequence.AttendCall(self.weights, sequence.AttendInputs(*inputs), self.place, out)

    def _inputs(self) -> tuple[Array, Array, Array]:
        return self.layer.q, self.layer.k, self.layer.v

    def _run(self, first: int, count: int, build: str, extra: object) -> tuple[Array, ...]:
        spec = self.layer.spec
        out = RowsOut.empty(self.gpu, count, spec.n_heads * spec.head_dim, self.int8)
        step = step_block(
            self.gpu, position=self.layer.past + first, tokens=count, state=self.state.address
        )
        call = self._call(first, count, out.rows)
        launch = getattr(sequence, build)(self.gpu, step, spec, call, extra)
        run(self.gpu, launch)
        found = out.read()
        out.x.clear()
        run(self.gpu, launch)  # the same pass again: counters are back, nothing has moved
        for a, b in zip(found, out.read(), strict=True):
            np.testing.assert_array_equal(a, b)
        return found

    def token(self, t: int, plan: sequence.AttendPlan | None = None) -> tuple[Array, ...]:
        return self._run(t, 1, "attend", plan)

    def chunk(self, first: int, count: int) -> tuple[Array, ...]:
        most = count + 2
        scratch = self.gpu.arena.take(sequence.attend_scratch_bytes(self.layer.spec, most))
        return self._run(first, count, "attend_chunk", (most, scratch))

    def check_cache(self) -> None:
        """The tokens' keys and values are in the cache, and nothing else was written."""
        keys, values = self._views(self.state.read())
        expected_keys, expected_values = self.layer.cache()
        n, half = len(expected_keys), self.layer.kv_dtype == "f16"
        by_position = values.transpose(0, 3, 1, 2).reshape(keys.shape)
        np.testing.assert_array_equal(by_position[:n], expected_values)
        np.testing.assert_array_equal(keys[: self.layer.past], self.layer.keys)
        np.testing.assert_allclose(
            keys[:n], expected_keys, rtol=1e-3 if half else 1e-5, atol=1e-3 if half else 3e-6
        )
        assert np.isnan(keys[n:]).all()
        # A chunk on matrix units clears the rest of its last 32 positions.
        assert not np.nan_to_num(by_position[n:]).any()
        assert np.isnan(by_position[(n + 31) // 32 * 32 :]).all()


@pytest.fixture(params=[32, 64])
def gpu(request: pytest.FixtureRequest) -> Iterator[GPU]:
    with gpu_under_test(request.param) as gpu:
        yield gpu


def joined(parts: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def tolerance(kv_dtype: str) -> float:
    return HALF_TOLERANCE if kv_dtype == "f16" else TOLERANCE


@pytest.mark.parametrize(
    ("spec", "kv_dtype", "past", "plan"),
    [
        (spec_of(4, 2, 16, 4), "f32", 0, None),
        (spec_of(4, 2, 16, 4), "f16", 63, (2, 3, 2)),
        (spec_of(2, 1, 32, 8), "f16", 31, None),
        (spec_of(2, 1, 32, 8), "f32", 200, (1, 5)),
        (spec_of(2, 1, 16, 4), "f16", 770, (1, 3, 2)),
        (spec_of(4, 2, 128, 32, 1e5), "f16", 95, (2, 2)),
        (spec_of(16, 1, 256, 64), "f16", 100, (16, 4)),
        (spec_of(6, 2, 256, 64), "f32", 33, (3, 4)),
    ],
)
def test_tokens_in_turn(
    gpu: GPU, spec: AttentionSpec, kv_dtype: str, past: int, plan: tuple[int, ...] | None
) -> None:
    tokens = 3
    bench = Bench(gpu, Layer.random(spec, kv_dtype, past, tokens), spec.head_dim % 32 == 0)
    chosen = sequence.AttendPlan(*plan) if plan else None
    found = joined([bench.token(t, chosen) for t in range(tokens)])
    check_rows(found, bench.layer.expected(), tolerance(kv_dtype))
    bench.check_cache()


@pytest.mark.parametrize(
    ("spec", "kv_dtype", "past"),
    [
        (spec_of(4, 2, 16, 4), "f32", 0),
        (spec_of(6, 2, 32, 8), "f16", 37),
        (spec_of(2, 1, 128, 32, 1e5), "f16", 64),
        (spec_of(8, 1, 256, 64), "f16", 5),
        (spec_of(3, 1, 64, 16), "f16", 90),
        (spec_of(3, 1, 64, 16), "f32", 90),
    ],
)
def test_prompts_in_chunks(gpu: GPU, spec: AttentionSpec, kv_dtype: str, past: int) -> None:
    tokens, int8 = 37, spec.head_dim % 32 == 0
    layer = Layer.random(spec, kv_dtype, past, tokens)
    whole, parts = Bench(gpu, layer, int8), Bench(gpu, layer, int8)
    found = whole.chunk(0, tokens)
    tiles = kv_dtype == "f16" and spec.head_dim % 32 == 0
    check_rows(found, layer.expected(), TILE_TOLERANCE if tiles else tolerance(kv_dtype))
    whole.check_cache()
    again = joined([parts.chunk(0, 1), parts.chunk(1, 34), parts.chunk(35, 2)])
    for a, b in zip(found, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_rotation_of_a_late_position(gpu: GPU) -> None:
    """A float angle would have lost its last five bits there."""
    spec, position = spec_of(1, 1, 32, 32, 10.0), 262_143
    layer = Layer.random(spec, "f32", 0, 1)
    # Only the last position is written; keys and values may lie over each other before it.
    place = sequence.KVPlace(0, 1 << 16, "f32", position + 1)
    state = gpu.arena.take(4 * 32 * (position + 1) + (1 << 16))
    tensors = (layer.q_norm, layer.k_norm, sequence.rope_turns(spec))
    weights = sequence.AttendWeights(*(Guarded.of(gpu, a).address for a in tensors), EPS)
    inputs = sequence.AttendInputs(
        *(Guarded.of(gpu, a).address for a in (layer.q, layer.k, layer.v))
    )
    out = RowsOut.empty(gpu, 1, 32, False)
    step = step_block(gpu, position=position, tokens=1, state=state)
    call = sequence.AttendCall(weights, inputs, place, out.rows)
    scratch = gpu.arena.take(sequence.attend_scratch_bytes(spec, 1))
    store, _ = sequence.attend_chunk(gpu, step, spec, call, (1, scratch))
    run(gpu, store)
    found = gpu.download(state + place.keys + 4 * 32 * position, np.float32, (1, 1, 32))
    k = reference.head_rms_norm(layer.k, layer.k_norm, EPS).astype(np.float32)
    expected = reference.rope(k, np.array([position], np.int32), 32, 10.0)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_sizes_that_the_kernel_does_not_take_are_refused(gpu: GPU) -> None:
    call = sequence.AttendCall(
        sequence.AttendWeights(0, 0, 0, EPS), sequence.AttendInputs(0, 0, 0),
        sequence.KVPlace(0, 0, "f16", 64), Rows(0, 1, 1),
    )  # fmt: skip
    with pytest.raises(DeviceError, match="heads of 80"):
        sequence.attend(gpu, 0, spec_of(2, 1, 80, 8), call)
    with pytest.raises(DeviceError, match="2 tiles of 4 rows ahead: registers have room for 1"):
        sequence.attend(gpu, 0, spec_of(4, 1, 32, 8), call, sequence.AttendPlan(4, 1, 2))
    with pytest.raises(DeviceError, match="3 query heads on 2"):
        sequence.attend(gpu, 0, spec_of(3, 2, 32, 8), call)
    with pytest.raises(DeviceError, match="KV type 'q8'"):
        StateLayout.of(("attention",), DELTA, spec_of(2, 1, 32, 8), 64, "q8")
