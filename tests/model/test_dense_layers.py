"""The native layers against the same operations one after the other, to the bit."""

import numpy as np
import pytest
from support.tiny_gguf import write_tiny

from fomoe.gguf.reader import open_gguf
from fomoe.kernels.cpu import layers, ops
from fomoe.model.archs import read_spec
from fomoe.model.attention import AttentionLayer, AttentionWeights
from fomoe.model.deltanet import DeltaLayer, DeltaWeights
from fomoe.model.linear import Weights, operands
from fomoe.model.moe import MoEWeights
from fomoe.model.state import Batch, SequenceState

TOKENS = (1, 2, 7, 261)  # 261: more than one tile
CTX = 300


@pytest.fixture(scope="module", params=["Q4_K_M", "Q2_K", "F16"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "m.gguf"
    write_tiny(path, seed=5, quant=request.param, layers=4, attention_interval=2, vocab=300)
    file = open_gguf(path)
    return read_spec(file), Weights(file)


def zeros(*shape):
    return np.zeros(shape, np.float32)


def residual(spec, tokens):
    return np.random.default_rng(tokens).standard_normal((tokens, spec.hidden), np.float32)


def multiply(w, x, int8):
    """W x as one product of its own."""
    out = zeros(len(x), w.rows)
    if not int8 or w.cols % 32 or w.qtype in (0, 1, 30):
        ops.matmul_f32(w.qtype, w.weight, x, out)
        return out
    q, scale = np.zeros(x.shape, np.int8), zeros(len(x), w.cols // 32)
    ops.quantize_activations(x, q, scale)
    ops.matmul_q8(w.qtype, w.weight, q, scale, out)
    return out


def normed(x, weight, eps):
    out = np.empty_like(x)
    ops.rms_norm(x, weight, eps, out)
    return out


def attention_by_steps(spec, w, x, cache, position, int8):
    a, t = spec.attention, len(x)
    h = normed(x, w.norm, spec.eps)
    both = multiply(w.q, h, int8).reshape(t, a.n_heads, 2, a.head_dim)
    q, gate = np.ascontiguousarray(both[:, :, 0]), np.ascontiguousarray(both[:, :, 1])
    k = multiply(w.k, h, int8).reshape(t, a.n_kv_heads, a.head_dim)
    v = multiply(w.v, h, int8).reshape(t, a.n_kv_heads, a.head_dim)
    positions = np.arange(position, position + t, dtype=np.int32)
    for heads, weight in ((q, w.q_norm), (k, w.k_norm)):
        ops.head_rms_norm(heads, weight, spec.eps)
        ops.rope(heads, positions, a.rope_dims, a.rope_base)
    ops.kv_store(k, v, cache.k, cache.v, position)
    mixed = np.empty_like(q)
    ops.attention(q, cache.k, cache.v, position, mixed)
    flat = mixed.reshape(t, -1)
    ops.sigmoid_gate(flat, gate.reshape(t, -1))
    ops.add(x, multiply(w.output, flat, int8))


def delta_by_steps(spec, w, x, state, int8):
    d, t = spec.delta, len(x)
    h = normed(x, w.norm, spec.eps)
    qkv, z, alpha, beta = (multiply(m, h, int8) for m in (w.qkv, w.z, w.alpha, w.beta))
    convolved, recurrent = np.empty_like(qkv), zeros(t, d.inner)
    ops.conv_silu(qkv, w.conv, state.conv, convolved)
    ops.deltanet(
        convolved, alpha, beta, w.decay, w.dt_bias, d.n_k_heads, d.n_v_heads, d.key_dim,
        d.value_dim, spec.eps, state.memory, recurrent,
    )  # fmt: skip
    out = np.empty_like(recurrent)
    ops.gated_rms_norm(recurrent, z, w.out_norm, spec.eps, out)
    ops.add(x, multiply(w.output, out, int8))


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kv_dtype", ["f16", "f32"])
def test_attention_equals_its_steps(model, tokens, int8, kv_dtype):
    spec, weights = model
    layer = spec.layers.index("attention")
    w = AttentionWeights.load(weights, spec, layer)
    mine, theirs = (SequenceState(spec, CTX, kv_dtype) for _ in range(2))
    native = AttentionLayer(w, spec, layer, int8=int8)
    for count in (3, tokens):
        x, y = residual(spec, count), residual(spec, count)
        batch = Batch.of([(mine, [0] * count)])
        native(x, batch)
        attention_by_steps(spec, w, y, theirs.layers[layer], theirs.length, int8)
        np.testing.assert_array_equal(x, y)
        batch.advance()
        theirs.length += count
    np.testing.assert_array_equal(mine.layers[layer].k, theirs.layers[layer].k)
    np.testing.assert_array_equal(mine.layers[layer].v, theirs.layers[layer].v)


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("tokens", TOKENS)
def test_deltanet_equals_its_steps(model, tokens, int8):
    spec, weights = model
    layer = spec.layers.index("delta")
    w = DeltaWeights.load(weights, spec, layer)
    mine, theirs = (SequenceState(spec, CTX, "f16") for _ in range(2))
    native = DeltaLayer(w, spec, layer, int8=int8)
    for count in (3, tokens):
        x, y = residual(spec, count), residual(spec, count)
        native(x, Batch.of([(mine, [0] * count)]))
        delta_by_steps(spec, w, y, theirs.layers[layer], int8)
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(mine.layers[layer].memory, theirs.layers[layer].memory)
    np.testing.assert_array_equal(mine.layers[layer].conv, theirs.layers[layer].conv)


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("tokens", TOKENS)
def test_router_and_shared_expert_equal_their_steps(model, tokens, int8):
    spec, weights = model
    w = MoEWeights.load(weights, spec, 0)
    native = layers.MoeDense(spec.eps, int8, operands(w))
    x = residual(spec, tokens)
    h, scores, out = np.empty_like(x), zeros(tokens, spec.moe.n_experts), np.empty_like(x)
    native.route(x, h, scores)
    native.shared(h, out)
    np.testing.assert_array_equal(h, normed(x, w.norm, spec.eps))
    np.testing.assert_array_equal(scores, multiply(w.router, h, int8=False))
    inner = zeros(tokens, spec.moe.shared_width)
    ops.silu_mul(multiply(w.gate, h, int8), multiply(w.up, h, int8), inner)
    expected = multiply(w.down, inner, int8)
    ops.scale_sigmoid(expected, multiply(w.scale, h, int8=False).reshape(tokens))
    np.testing.assert_array_equal(out, expected)


def test_weights_that_do_not_fit_are_refused(model):
    spec, weights = model
    w = operands(MoEWeights.load(weights, spec, 0))
    kind, matrix = w["down"]
    with pytest.raises(ValueError, match="down is"):
        layers.MoeDense(spec.eps, True, {**w, "down": (kind, matrix[:-1])})
    with pytest.raises(ValueError, match="weight type 99"):
        layers.MoeDense(spec.eps, True, {**w, "up": (99, w["up"][1])})
