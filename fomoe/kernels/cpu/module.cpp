// Python bindings: check types and shapes, release the GIL where the work is long, call drive.h.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <stdexcept>
#include <string>

#include "checks.h"
#include "dispatch.h"
#include "layer.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fomoe::cpu {
namespace {

// Runs body without the GIL where it has more than some 10 us to do.
template <class Body>
void release(int64_t bytes, const Body& body) {
  if (bytes < kInlineBytes) return body();
  nb::gil_scoped_release unlocked;
  body();
}

uint64_t py_stream_read(Array<const uint8_t, 1> data) {
  nb::gil_scoped_release unlocked;
  return stream_read(data.data(), dim(data, 0));
}

void py_dequantize(int type, Bytes w, Out<2> out) {
  same("rows of out", dim(out, 0), dim(w, 0));
  const Matrix m = matrix(type, w, dim(out, 1));
  release(m.bytes(), [&] { dequantize_rows(m, out.data()); });
}

void py_embed(int type, Bytes w, Ints<1> ids, Out<2> out) {
  const Matrix m = matrix(type, w, dim(out, 1));
  same("rows of out", dim(out, 0), dim(ids, 0));
  for (int64_t t = 0; t < dim(ids, 0); ++t)
    if (ids.data()[t] < 0 || ids.data()[t] >= m.rows)
      fail("id " + std::to_string(ids.data()[t]) + " is not below " + std::to_string(m.rows));
  embed(m, ids.data(), dim(ids, 0), out.data());
}

void py_quantize(In<2> x, Array<int8_t, 2> q, Out<2> scale) {
  const int64_t tokens = dim(x, 0), cols = dim(x, 1);
  if (cols % 32) fail("int8 activations need a multiple of 32 values, not " + std::to_string(cols));
  same("rows of q", dim(q, 0), tokens);
  same("columns of q", dim(q, 1), cols);
  same("rows of scale", dim(scale, 0), tokens);
  same("columns of scale", dim(scale, 1), cols / 32);
  release(tokens * cols, [&] { quantize_rows(x.data(), tokens, cols, q.data(), scale.data()); });
}

void py_matmul_q8(int type, Bytes w, Array<const int8_t, 2> q, In<2> scale, Out<2> out) {
  const int64_t tokens = dim(q, 0), cols = dim(q, 1);
  const Matrix m = matrix(type, w, cols);
  if (is_float_type(type)) fail("float weights take float32 activations: matmul_f32");
  same("rows of scale", dim(scale, 0), tokens);
  same("columns of scale", dim(scale, 1), cols / 32);
  same("rows of out", dim(out, 0), tokens);
  same("columns of out", dim(out, 1), m.rows);
  release(m.bytes(), [&] { matmul_q8(m, q.data(), scale.data(), tokens, out.data()); });
}

void py_matmul_f32(int type, Bytes w, In<2> x, Out<2> out) {
  const Matrix m = matrix(type, w, dim(x, 1));
  same("rows of out", dim(out, 0), dim(x, 0));
  same("columns of out", dim(out, 1), m.rows);
  release(m.bytes(), [&] { matmul_f32(m, x.data(), dim(x, 0), out.data()); });
}

void check_experts(const ExpertCall& c) {
  check_type(c.gate_type, c.hidden);
  check_type(c.up_type, c.hidden);
  check_type(c.down_type, c.width);
  if (c.count && c.pair_start[0] != 0)
    fail("pair_start begins at " + std::to_string(c.pair_start[0]));
  for (int64_t i = 0; i < c.count; ++i)
    if (c.pair_start[i] > c.pair_start[i + 1])
      fail("pair_start falls at expert " + std::to_string(i));
  for (int64_t p = 0; p < c.pairs(); ++p)
    if (c.pair_token[p] < 0 || c.pair_token[p] >= c.tokens)
      fail("pair " + std::to_string(p) + " names token " + std::to_string(c.pair_token[p]) +
           " of " + std::to_string(c.tokens));
}

using Addresses = Array<const uint64_t, 1>;
using ExpertTypes = std::tuple<int, int, int>;

// Everything but the size of out is checked here.
ExpertCall expert_call(const Addresses& gate, const Addresses& up, const Addresses& down,
                       const ExpertTypes& types, int64_t hidden, int64_t width, const In<2>& x,
                       const Ints<1>& pair_start, const Ints<1>& pair_token, const Out<2>& out) {
  same("addresses of up", dim(up, 0), dim(gate, 0));
  same("addresses of down", dim(down, 0), dim(gate, 0));
  same("entries of pair_start", dim(pair_start, 0), dim(gate, 0) + 1);
  same("columns of x", dim(x, 1), hidden);
  same("columns of out", dim(out, 1), hidden);
  const ExpertCall c{gate.data(),
                     up.data(),
                     down.data(),
                     std::get<0>(types),
                     std::get<1>(types),
                     std::get<2>(types),
                     dim(gate, 0),
                     hidden,
                     width,
                     x.data(),
                     dim(x, 0),
                     pair_start.data(),
                     pair_token.data(),
                     out.data()};
  same("entries of pair_token", dim(pair_token, 0), c.pairs());
  check_experts(c);
  return c;
}

void py_experts(Addresses gate, Addresses up, Addresses down, ExpertTypes types, int64_t hidden,
                int64_t width, In<2> x, Ints<1> pair_start, Ints<1> pair_token, Out<2> out,
                bool exact) {
  const ExpertCall c =
      expert_call(gate, up, down, types, hidden, width, x, pair_start, pair_token, out);
  same("rows of out", dim(out, 0), c.pairs());
  release(c.count * hidden * width, [&] { experts(c, exact); });
}

void py_experts_sum(Addresses gate, Addresses up, Addresses down, ExpertTypes types, int64_t hidden,
                    int64_t width, In<2> x, Ints<1> pair_start, Ints<1> pair_token, In<1> weights,
                    Out<2> out, bool exact) {
  const ExpertCall c =
      expert_call(gate, up, down, types, hidden, width, x, pair_start, pair_token, out);
  same("rows of out", dim(out, 0), c.tokens);
  same("weights", dim(weights, 0), c.pairs());
  release(c.count * hidden * width, [&] { experts_sum(c, weights.data(), exact); });
}

void py_reduce_pairs(In<2> pairs, Ints<2> order, In<2> weights, Out<2> out) {
  const int64_t tokens = dim(order, 0), k = dim(order, 1), cols = dim(pairs, 1);
  same("rows of weights", dim(weights, 0), tokens);
  same("columns of weights", dim(weights, 1), k);
  same("rows of out", dim(out, 0), tokens);
  same("columns of out", dim(out, 1), cols);
  for (int64_t i = 0; i < tokens * k; ++i)
    if (order.data()[i] < 0 || order.data()[i] >= dim(pairs, 0))
      fail("order names pair " + std::to_string(order.data()[i]) + " of " +
           std::to_string(dim(pairs, 0)));
  release(tokens * k * cols * 4, [&] {
    reduce_pairs(pairs.data(), order.data(), weights.data(), tokens, k, cols, out.data());
  });
}

void py_rms_norm(In<2> x, In<1> weight, float eps, Out<2> out) {
  same("length of weight", dim(weight, 0), dim(x, 1));
  same("rows of out", dim(out, 0), dim(x, 0));
  same("columns of out", dim(out, 1), dim(x, 1));
  rms_norm(x.data(), nullptr, weight.data(), dim(x, 0), dim(x, 1), eps, out.data());
}

void py_gated_rms_norm(In<2> x, In<2> z, In<1> weight, float eps, Out<2> out) {
  const int64_t d = dim(weight, 0);
  if (d == 0 || dim(x, 1) % d)
    fail("columns of x (" + std::to_string(dim(x, 1)) + ") are not whole heads of " +
         std::to_string(d));
  for (const int i : {0, 1}) {
    same("size of z", dim(z, i), dim(x, i));
    same("size of out", dim(out, i), dim(x, i));
  }
  const int64_t rows = dim(x, 0) * dim(x, 1) / d;
  release(rows * d * 4,
          [&] { rms_norm(x.data(), z.data(), weight.data(), rows, d, eps, out.data()); });
}

void py_head_rms_norm(Out<3> x, In<1> weight, float eps) {
  same("length of weight", dim(weight, 0), dim(x, 2));
  rms_norm(x.data(), nullptr, weight.data(), dim(x, 0) * dim(x, 1), dim(x, 2), eps, x.data());
}

void py_rope(Out<3> x, Ints<1> positions, int64_t n_rot, double base) {
  same("number of positions", dim(positions, 0), dim(x, 0));
  if (n_rot < 0 || n_rot % 2 || n_rot > dim(x, 2))
    fail("n_rot is " + std::to_string(n_rot) + ", must be even and at most " +
         std::to_string(dim(x, 2)));
  rope(x.data(), positions.data(), dim(x, 0), dim(x, 1), dim(x, 2), n_rot, base);
}

void py_kv_store(In<3> k, In<3> v, CacheArray cache_k, CacheArray cache_v, int64_t position0) {
  const Cache c = cache_of(cache_k, cache_v);
  check_positions(c, position0, dim(k, 0));
  for (int i = 0; i < 3; ++i) same("size of v", dim(v, i), dim(k, i));
  same("heads of k", dim(k, 1), c.heads);
  same("head size of k", dim(k, 2), c.dim);
  kv_store(k.data(), v.data(), dim(k, 0), c, position0);
}

void py_attention(In<3> q, CacheArray cache_k, CacheArray cache_v, int64_t position0, Out<3> out) {
  const Cache c = cache_of(cache_k, cache_v);
  check_positions(c, position0, dim(q, 0));
  for (int i = 0; i < 3; ++i) same("size of out", dim(out, i), dim(q, i));
  same("head size of q", dim(q, 2), c.dim);
  if (c.heads == 0 || dim(q, 1) % c.heads)
    fail(std::to_string(dim(q, 1)) + " heads do not share " + std::to_string(c.heads) +
         " kv heads evenly");
  if (c.dim % 8) fail("head size " + std::to_string(c.dim) + " is not a multiple of 8");
  release(dim(q, 0) * (position0 + dim(q, 0)) * dim(q, 1) * c.dim,
          [&] { attention(q.data(), dim(q, 0), dim(q, 1), c, position0, out.data()); });
}

void py_sigmoid_gate(Out<2> x, In<2> gate) {
  for (const int i : {0, 1}) same("size of gate", dim(gate, i), dim(x, i));
  sigmoid_gate(x.data(), gate.data(), dim(x, 0) * dim(x, 1));
}

void py_conv_silu(In<2> x, In<2> weight, Out<2> state, Out<2> out) {
  const int64_t channels = dim(x, 1), width = dim(weight, 1);
  if (width < 1 || width > kMaxTaps)
    fail("a convolution of width " + std::to_string(width) + ", must be 1 to " +
         std::to_string(kMaxTaps));
  same("rows of weight", dim(weight, 0), channels);
  same("rows of state", dim(state, 0), width - 1);
  same("columns of state", dim(state, 1), channels);
  for (const int i : {0, 1}) same("size of out", dim(out, i), dim(x, i));
  release(dim(x, 0) * channels * 8, [&] {
    conv_silu(x.data(), weight.data(), state.data(), dim(x, 0), channels, width, out.data());
  });
}

void py_deltanet(In<2> qkv, In<2> alpha, In<2> beta, In<1> ssm_a, In<1> dt_bias, int64_t key_heads,
                 int64_t value_heads, int64_t key_dim, int64_t value_dim, float eps, Out<3> state,
                 Out<2> out) {
  const DeltaShape s{key_heads, value_heads, key_dim, value_dim};
  const int64_t tokens = dim(qkv, 0);
  if (key_heads < 1 || value_heads < 1 || key_dim < 1 || value_dim < 8 || value_dim % 8)
    fail("the delta rule needs heads and a value size that is a multiple of 8");
  same("columns of qkv", dim(qkv, 1), s.channels());
  for (const auto* gate : {&alpha, &beta}) {
    same("rows of alpha and beta", dim(*gate, 0), tokens);
    same("columns of alpha and beta", dim(*gate, 1), value_heads);
  }
  same("length of ssm_a", dim(ssm_a, 0), value_heads);
  same("length of dt_bias", dim(dt_bias, 0), value_heads);
  same("heads of state", dim(state, 0), value_heads);
  same("rows of state", dim(state, 1), key_dim);
  same("columns of state", dim(state, 2), value_dim);
  same("rows of out", dim(out, 0), tokens);
  same("columns of out", dim(out, 1), value_heads * value_dim);
  release(tokens * value_heads * key_dim * value_dim * 4, [&] {
    deltanet({qkv.data(), alpha.data(), beta.data(), ssm_a.data(), dt_bias.data(), s, tokens, eps,
              state.data(), out.data()});
  });
}

void py_silu_mul(In<2> gate, In<2> up, Out<2> out) {
  for (const int i : {0, 1}) {
    same("size of up", dim(up, i), dim(gate, i));
    same("size of out", dim(out, i), dim(gate, i));
  }
  silu_mul(gate.data(), up.data(), dim(gate, 0) * dim(gate, 1), out.data());
}

void py_add(Out<2> a, In<2> b) {
  for (const int i : {0, 1}) same("size of b", dim(b, i), dim(a, i));
  add(a.data(), b.data(), dim(a, 0) * dim(a, 1));
}

void py_add3(In<2> routed, In<2> shared, Out<2> residual) {
  for (const int i : {0, 1}) {
    same("size of routed", dim(routed, i), dim(residual, i));
    same("size of shared", dim(shared, i), dim(residual, i));
  }
  add3(routed.data(), shared.data(), residual.data(), dim(residual, 0) * dim(residual, 1));
}

void py_scale_sigmoid(Out<2> x, In<1> gate) {
  same("length of gate", dim(gate, 0), dim(x, 0));
  scale_sigmoid(x.data(), gate.data(), dim(x, 0), dim(x, 1));
}

void py_set_threads(int count) {
  if (count < 1) fail("threads must be at least 1, not " + std::to_string(count));
  nb::gil_scoped_release unlocked;
  set_threads(count);
}

}  // namespace
}  // namespace fomoe::cpu

NB_MODULE(_cpu, m) {
  using namespace fomoe::cpu;
  if (_import_array() < 0) throw nb::python_error();

  m.def("set_threads", &py_set_threads, "count"_a);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("isa_report", &isa_report);
  m.def("use_isa", &use_isa, "name"_a);
  m.def("stream_read", &py_stream_read, "data"_a);
  m.def(
      "call_seconds",
      [](int64_t n) {
        nb::gil_scoped_release unlocked;
        return call_seconds(n);
      },
      "n"_a);
  m.def("dequantize", &py_dequantize, "qtype"_a, "weights"_a, "out"_a);
  m.def("embed", &py_embed, "qtype"_a, "weights"_a, "ids"_a, "out"_a);
  m.def("quantize_activations", &py_quantize, "x"_a, "q"_a, "scale"_a);
  m.def("matmul_q8", &py_matmul_q8, "qtype"_a, "weights"_a, "q"_a, "scale"_a, "out"_a);
  m.def("matmul_f32", &py_matmul_f32, "qtype"_a, "weights"_a, "x"_a, "out"_a);
  m.def("experts", &py_experts, "gate"_a, "up"_a, "down"_a, "qtypes"_a, "hidden"_a, "width"_a,
        "x"_a, "pair_start"_a, "pair_token"_a, "out"_a, "exact_activations"_a);
  m.def("experts_sum", &py_experts_sum, "gate"_a, "up"_a, "down"_a, "qtypes"_a, "hidden"_a,
        "width"_a, "x"_a, "pair_start"_a, "pair_token"_a, "weights"_a, "out"_a,
        "exact_activations"_a);
  m.def("reduce_pairs", &py_reduce_pairs, "pairs"_a, "order"_a, "weights"_a, "out"_a);
  m.def("rms_norm", &py_rms_norm, "x"_a, "weight"_a, "eps"_a, "out"_a);
  m.def("gated_rms_norm", &py_gated_rms_norm, "x"_a, "z"_a, "weight"_a, "eps"_a, "out"_a);
  m.def("head_rms_norm", &py_head_rms_norm, "x"_a, "weight"_a, "eps"_a);
  m.def("rope", &py_rope, "x"_a, "positions"_a, "n_rot"_a, "base"_a);
  m.def("kv_store", &py_kv_store, "k"_a, "v"_a, "cache_k"_a, "cache_v"_a, "position0"_a);
  m.def("attention", &py_attention, "q"_a, "cache_k"_a, "cache_v"_a, "position0"_a, "out"_a);
  m.def("sigmoid_gate", &py_sigmoid_gate, "x"_a, "gate"_a);
  m.def("conv_silu", &py_conv_silu, "x"_a, "weight"_a, "state"_a, "out"_a);
  m.def("deltanet", &py_deltanet, "qkv"_a, "alpha"_a, "beta"_a, "ssm_a"_a, "dt_bias"_a,
        "n_k_heads"_a, "n_v_heads"_a, "dk"_a, "dv"_a, "eps"_a, "state"_a, "out"_a);
  m.def("silu_mul", &py_silu_mul, "gate"_a, "up"_a, "out"_a);
  m.def("add", &py_add, "a"_a, "b"_a);
  m.def("add3", &py_add3, "routed"_a, "shared"_a, "residual"_a);
  m.def("scale_sigmoid", &py_scale_sigmoid, "x"_a, "gate"_a);
  bind_layers(m);
}
