"""DeltaNet layers on a GPU, against float64 and against themselves in other chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from gpu_arrays import Array, Guarded, RowsOut, check_rows, error, run, step_block
from support.emulated_gpu import gpu_under_test

from fomoe.errors import DeviceError
from fomoe.kernels import reference
from fomoe.kernels.gpu import sequence
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.state import StateLayout, channels
from fomoe.kernels.gpu.step import Rows
from fomoe.model.spec import AttentionSpec, DeltaSpec

EPS = 1e-6
# float32 through two norms, a recurrence of some tokens and two products of 128.
TOLERANCE = 3e-5
ATTENTION = AttentionSpec(n_heads=2, n_kv_heads=1, head_dim=32, rope_dims=8, rope_base=1e4)


def spec_of(n_k: int, n_v: int, dk: int, dv: int, width: int) -> DeltaSpec:
    return DeltaSpec(n_k_heads=n_k, n_v_heads=n_v, key_dim=dk, value_dim=dv, conv_width=width)


@dataclass(frozen=True)
class Layer:
    """A layer's tensors and the inputs of some tokens, all float32."""

    spec: DeltaSpec
    qkv: Array
    z: Array
    alpha: Array
    beta: Array
    conv: Array
    ssm_a: Array
    dt_bias: Array
    norm: Array

    @classmethod
    def random(cls, spec: DeltaSpec, tokens: int) -> Layer:
        rng = np.random.default_rng(spec.n_v_heads * 100 + tokens)

        def floats(*shape: int) -> Array:
            return rng.standard_normal(shape, dtype=np.float32)

        n = spec.n_v_heads
        return cls(
            spec, floats(tokens, channels(spec)), 2 * floats(tokens, n * spec.value_dim),
            3 * floats(tokens, n), floats(tokens, n), floats(channels(spec), spec.conv_width),
            -np.exp(floats(n)), floats(n), 1 + floats(spec.value_dim) / 4,
        )  # fmt: skip

    def expected(self) -> tuple[Array, Array]:
        """Rows of all tokens and the memory after them, in float64."""
        s = self.spec
        start = np.zeros((s.conv_width - 1, channels(s)), np.float32)
        mixed, _ = reference.conv_silu(self.qkv, self.conv, start)
        heads = reference.DeltaHeads(s.n_k_heads, s.n_v_heads, s.key_dim, s.value_dim)
        gates = reference.DeltaGates(self.alpha, self.beta, self.ssm_a, self.dt_bias)
        memory = np.zeros((s.n_v_heads, s.key_dim, s.value_dim), np.float32)
        out, memory = reference.deltanet(mixed, gates, heads, EPS, memory)
        return reference.gated_rms_norm(out, self.z, self.norm, EPS), memory


class Bench:
    """A layer on a GPU with a state of its own, second of three layers."""

    def __init__(self, gpu: GPU, layer: Layer, int8: bool) -> None:
        self.gpu, self.layer, self.int8 = gpu, layer, int8
        layout = StateLayout.of(("delta", "delta", "attention"), layer.spec, ATTENTION, 64, "f16")
        assert layout.recurrent_bytes % 2 == 0
        self.place = layout.layers[1]
        assert isinstance(self.place, sequence.DeltaPlace)
        self._layer_bytes = layout.recurrent_bytes // 2
        whole = np.full(layout.nbytes, 0xA5, np.uint8)
        whole[self._layer_bytes : layout.recurrent_bytes] = 0
        self.state = Guarded.of(gpu, whole)
        self.weights = sequence.DeltaWeights(
            *(
                Guarded.of(gpu, a).address
                for a in (layer.conv, layer.ssm_a, layer.dt_bias, layer.norm)
            ),
            EPS,
        )

    def _call(self, first: int, count: int, out: Rows) -> sequence.DeltaCall:
        rows = slice(first, first + count)
        parts = (self.layer.qkv, self.layer.z, self.layer.alpha, self.layer.beta)
        inputs = sequence.DeltaInputs(*(Guarded.of(self.gpu, a[rows]).address for a in parts))
        return sequence.DeltaCall(self.weights, inputs, self.place, out)

    def _out(self, count: int) -> RowsOut:
        return RowsOut.empty(self.gpu, count, self.layer.spec.inner, self.int8)

    def token(self, t: int, parts: int | None = None) -> tuple[Array, ...]:
        out = self._out(1)
        step = step_block(self.gpu, position=t, state=self.state.address)
        call = self._call(t, 1, out.rows)
        run(self.gpu, sequence.delta(self.gpu, step, self.layer.spec, call, parts))
        return out.read()

    def chunk(self, first: int, count: int) -> tuple[Array, ...]:
        spec, most = self.layer.spec, count + 3  # room for more tokens than the pass has
        out = self._out(count)
        step = step_block(self.gpu, position=first, tokens=count, state=self.state.address)
        scratch = self.gpu.arena.take(sequence.delta_scratch_bytes(spec, most))
        call = self._call(first, count, out.rows)
        run(self.gpu, sequence.delta_chunk(self.gpu, step, spec, call, (most, scratch)))
        return out.read()

    def memory(self) -> Array:
        """[n_v, dk, dv]; nothing of the other layers may have changed."""
        whole, s, size = self.state.read(), self.layer.spec, self._layer_bytes
        assert (whole[:size] == 0xA5).all()
        assert (whole[2 * size :] == 0xA5).all()
        floats = whole[self.place.memory :].view(np.float32)[
            : s.n_v_heads * s.value_dim * s.key_dim
        ]
        return floats.reshape(s.n_v_heads, s.value_dim, s.key_dim).transpose(0, 2, 1)

    def bits(self) -> bytes:
        return self.state.read().tobytes()


@pytest.fixture(params=[32, 64])
def gpu(request: pytest.FixtureRequest) -> Iterator[GPU]:
    with gpu_under_test(request.param) as gpu:
        yield gpu


def joined(parts: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


@pytest.mark.parametrize(
    ("spec", "parts", "int8"),
    [
        (spec_of(3, 3, 16, 16, 4), 1, False),
        (spec_of(2, 6, 16, 16, 4), 2, False),
        (spec_of(1, 2, 32, 32, 4), 1, True),
        (spec_of(2, 4, 64, 64, 4), 4, True),
        (spec_of(1, 2, 128, 128, 4), 2, True),
        (spec_of(1, 2, 128, 128, 4), 1, True),
        (spec_of(2, 2, 12, 160, 3), 1, True),
    ],
)
def test_tokens_in_turn(gpu: GPU, spec: DeltaSpec, parts: int, int8: bool) -> None:
    tokens = 7
    bench = Bench(gpu, Layer.random(spec, tokens), int8)
    found = joined([bench.token(t, parts) for t in range(tokens)])
    rows, memory = bench.layer.expected()
    check_rows(found, rows, TOLERANCE)
    assert error(bench.memory(), memory) < TOLERANCE


@pytest.mark.parametrize(
    "spec", [spec_of(2, 6, 16, 16, 4), spec_of(1, 2, 32, 64, 4), spec_of(1, 1, 128, 128, 4)]
)
def test_chunks_have_the_bits_of_tokens(gpu: GPU, spec: DeltaSpec) -> None:
    tokens, int8 = 21, spec.value_dim % 32 == 0
    layer = Layer.random(spec, tokens)
    single, chunked = Bench(gpu, layer, int8), Bench(gpu, layer, int8)
    expected = joined([single.token(t) for t in range(tokens)])
    pieces = [chunked.chunk(0, 1), chunked.chunk(1, 2), chunked.chunk(3, 17), chunked.chunk(20, 1)]
    for found, wanted in zip(joined(pieces), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert chunked.bits() == single.bits()
    check_rows(expected, layer.expected()[0], TOLERANCE)


def test_sizes_that_the_kernel_does_not_take_are_refused(gpu: GPU) -> None:
    call = sequence.DeltaCall(
        sequence.DeltaWeights(0, 0, 0, 0, EPS), sequence.DeltaInputs(0, 0, 0, 0),
        sequence.DeltaPlace(0, 0), Rows(0, 1, 1),
    )  # fmt: skip
    with pytest.raises(DeviceError, match="3 value heads on 2"):
        sequence.delta(gpu, 0, spec_of(2, 3, 16, 16, 4), call)
    with pytest.raises(DeviceError, match="int8 rows of heads of 16"):
        sequence.delta(gpu, 0, spec_of(1, 1, 16, 16, 4), call)
