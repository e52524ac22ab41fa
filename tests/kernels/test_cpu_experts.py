"""Routed experts: equal to the single operations, at any address, in int8 and in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from kernel_cases import FLOAT_KINDS, floats, weights_of
from kernel_harness import Array, Guarded, available_isas

from fomoe.kernels import reference
from fomoe.kernels.cpu import ops

MIXES = (
    (Kind.Q4_K, Kind.Q4_K, Kind.Q6_K),
    (Kind.Q4_K, Kind.Q4_K, Kind.Q5_K),
    (Kind.Q2_K, Kind.Q4_K, Kind.Q2_K),
    (Kind.IQ4_XS, Kind.Q3_K, Kind.IQ4_NL),
    (Kind.Q5_1, Kind.Q2_K, Kind.Q4_1),
    (Kind.Q8_0, Kind.Q5_0, Kind.Q4_0),
    (Kind.F16, Kind.Q4_K, Kind.Q6_K),  # a float part takes float32 activations in any mode
    (Kind.Q4_K, Kind.Q4_K, Kind.BF16),
    (Kind.F32, Kind.F32, Kind.Q2_K),
)


@pytest.fixture(params=available_isas(), autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = ops.isa()
    ops.use_isa(request.param)
    yield
    ops.use_isa(before)
    ops.set_threads(1)


class Layer:
    """Experts whose blocks lie at odd addresses of one byte array."""

    def __init__(self, rng: np.random.Generator, mix: tuple[Kind, ...], n: int, d: int, f: int):
        self.types, self.d, self.f = tuple(int(k) for k in mix), d, f
        shapes = ((f, d), (f, d), (d, f))
        self.experts = [
            reference.Expert(
                *(weights_of(rng, k, *s) for k, s in zip(mix, shapes, strict=True)), self.types
            )
            for _ in range(n)
        ]
        parts = [w for e in self.experts for w in (e.gate, e.up, e.down)]
        self._bytes = np.full(sum(w.nbytes + 64 for w in parts), 0xFF, np.uint8)
        addresses, at = [], 1
        for w in parts:
            self._bytes[at : at + w.nbytes] = w.ravel()
            addresses.append(self._bytes.ctypes.data + at)
            at += w.nbytes + (63 if (at + w.nbytes) % 2 else 62) - 20
        self.addresses = np.array(addresses, np.uint64).reshape(n, 3).T.copy()

    def run(self, x: Array, start: Array, token: Array, exact: bool) -> Array:
        out = Guarded((len(token), self.d), np.float32)
        ops.experts(
            *self.addresses, self.types, self.d, self.f, x, start, token, out.array, exact
        )  # fmt: skip
        assert out.intact()
        return out.array

    def run_sum(self, x: Array, start: Array, token: Array, weights: Array, exact: bool) -> Array:
        out = Guarded.of(np.zeros((len(x), self.d), np.float32))
        ops.experts_sum(
            *self.addresses, self.types, self.d, self.f, x, start, token, weights, out.array, exact
        )  # fmt: skip
        assert out.intact()
        return out.array


@dataclass(frozen=True)
class Pairs:
    start: Array
    token: Array


def pairs_of(rng: np.random.Generator, n: int, tokens: int) -> Pairs:
    """Each token takes about half of the experts; the second one stays without tokens."""
    takes = [sorted(rng.permutation(tokens)[: 1 + tokens // 2]) if i != 1 else [] for i in range(n)]
    start = np.cumsum([0] + [len(t) for t in takes]).astype(np.int32)
    return Pairs(start, np.concatenate(takes).astype(np.int32))


def one_by_one(layer: Layer, x: Array, pairs: Pairs, exact: bool) -> Array:
    """The same through the single operations, pair by pair."""
    out = np.empty((len(pairs.token), layer.d), np.float32)
    gate, up = np.empty((1, layer.f), np.float32), np.empty((1, layer.f), np.float32)
    for i, expert in enumerate(layer.experts):
        for p in range(pairs.start[i], pairs.start[i + 1]):
            row = x[pairs.token[p]][None]
            product(expert.qtypes[0], expert.gate, row, gate, exact)
            product(expert.qtypes[1], expert.up, row, up, exact)
            ops.silu_mul(gate, up, gate)
            product(expert.qtypes[2], expert.down, gate, out[p : p + 1], exact)
    return out


def product(qtype: int, w: Array, x: Array, out: Array, exact: bool) -> None:
    if exact or qtype in FLOAT_KINDS:
        ops.matmul_f32(qtype, w, x, out)
        return
    q, scale = np.empty(x.shape, np.int8), np.empty((1, x.shape[1] // 32), np.float32)
    ops.quantize_activations(x, q, scale)
    ops.matmul_q8(qtype, w, q, scale, out)


@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "-".join(k.name for k in m))
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 39])
def test_equals_the_single_operations(mix: tuple[Kind, ...], exact: bool, tokens: int) -> None:
    rng = np.random.default_rng(1)
    width = 288 if mix[2] in (Kind.IQ4_NL, Kind.Q4_1, Kind.Q4_0) else 256
    layer, x = Layer(rng, mix, 3, 512, width), floats(rng, tokens, 512)
    pairs = pairs_of(rng, 3, tokens)
    found = layer.run(x, pairs.start, pairs.token, exact)
    assert np.array_equal(found, one_by_one(layer, x, pairs, exact))


@pytest.mark.parametrize("exact", [True, False])
def test_threads_and_grouping_keep_the_bits(exact: bool) -> None:
    rng = np.random.default_rng(2)
    layer, x = Layer(rng, MIXES[0], 4, 512, 512), floats(rng, 40, 512)
    pairs = pairs_of(rng, 4, 40)
    found = layer.run(x, pairs.start, pairs.token, exact)
    for threads in (2, 3):
        ops.set_threads(threads)
        assert np.array_equal(layer.run(x, pairs.start, pairs.token, exact), found)
    for p in (0, 17, len(pairs.token) - 1):
        start = np.searchsorted(np.arange(p, p + 2), pairs.start, side="left").clip(0, 1)
        alone = layer.run(x, start.astype(np.int32), pairs.token[p : p + 1], exact)
        assert np.array_equal(alone[0], found[p])


def reduced(layer: Layer, x: Array, pairs: Pairs, weights: Array, exact: bool) -> Array:
    """The decode path: all rows, then each token's weighted sum of them, experts ascending."""
    rows = layer.run(x, pairs.start, pairs.token, exact)
    out = np.zeros_like(x)
    for t in range(len(x)):
        order = np.flatnonzero(pairs.token == t).astype(np.int32)
        ops.reduce_pairs(rows, order[None], weights[order][None], out[t : t + 1])
    return out


@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "-".join(k.name for k in m))
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 39])
def test_sums_are_those_of_reduced_rows(mix: tuple[Kind, ...], exact: bool, tokens: int) -> None:
    rng = np.random.default_rng(6)
    width = 288 if mix[2] in (Kind.IQ4_NL, Kind.Q4_1, Kind.Q4_0) else 256
    layer, x = Layer(rng, mix, 4, 768, width), floats(rng, tokens, 768)
    pairs = pairs_of(rng, 4, tokens)
    weights = floats(rng, len(pairs.token))
    expected = reduced(layer, x, pairs, weights, exact)
    for threads in (1, 3):
        ops.set_threads(threads)
        found = layer.run_sum(x, pairs.start, pairs.token, weights, exact)
        assert np.array_equal(found, expected)
    half = len(x) // 2  # a call of the first experts and a call of the rest add up alike
    if half:
        out = np.zeros_like(x)
        middle = int(pairs.start[2])
        for cut, experts in ((slice(0, middle), slice(0, 2)), (slice(middle, None), slice(2, 4))):
            start = pairs.start[experts.start : experts.stop + 1] - pairs.start[experts.start]
            ops.experts_sum(
                *layer.addresses[:, experts].copy(), layer.types, 768, width, x,
                np.ascontiguousarray(start), pairs.token[cut], weights[cut], out, exact,
            )  # fmt: skip
        assert np.array_equal(out, expected)


def test_sums_agree_with_float64() -> None:
    rng = np.random.default_rng(7)
    layer, x = Layer(rng, (Kind.F16, Kind.BF16, Kind.F32), 3, 96, 50), floats(rng, 19, 96)
    pairs = pairs_of(rng, 3, 19)
    weights = floats(rng, len(pairs.token))
    found = layer.run_sum(x, pairs.start, pairs.token, weights, exact=True)
    expected = reference.experts_sum(layer.experts, x, pairs.start, pairs.token, weights)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_float_weights_and_float64() -> None:
    rng = np.random.default_rng(3)
    layer, x = Layer(rng, (Kind.F16, Kind.BF16, Kind.F32), 3, 96, 50), floats(rng, 5, 96)
    pairs = pairs_of(rng, 3, 5)
    found = layer.run(x, pairs.start, pairs.token, exact=True)
    expected = reference.experts(layer.experts, x, pairs.start, pairs.token)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_int8_activations_stay_close_to_float64() -> None:
    """int8 per 32 rounds by half of max / 127: about 0.4 % of a normal sample, twice over."""
    rng = np.random.default_rng(4)
    layer, x = Layer(rng, MIXES[0], 3, 512, 512), floats(rng, 5, 512)
    pairs = pairs_of(rng, 3, 5)
    found = layer.run(x, pairs.start, pairs.token, exact=False)
    expected = reference.experts(layer.experts, x, pairs.start, pairs.token)
    assert np.linalg.norm(found - expected) <= 0.02 * np.linalg.norm(expected)


def test_no_experts_and_no_tokens() -> None:
    rng = np.random.default_rng(5)
    layer, x = Layer(rng, MIXES[0], 2, 256, 256), floats(rng, 1, 256)
    none = np.zeros(0, np.int32)
    assert layer.run(x, np.zeros(3, np.int32), none, exact=False).shape == (0, 256)
    nobody = np.zeros(0, np.uint64)
    out = np.empty((0, 256), np.float32)
    ops.experts(
        nobody, nobody, nobody, layer.types, 256, 256, x, np.zeros(1, np.int32), none, out, False
    )
