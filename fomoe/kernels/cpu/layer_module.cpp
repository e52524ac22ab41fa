// Bindings of layer.h: weights are checked once, at construction, and kept alive by the object.
#define NO_IMPORT_ARRAY
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "checks.h"
#include "layer.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fomoe::cpu {
namespace {

using Weight = std::tuple<int, nb::object>;  // ggml type, uint8 [rows, row_bytes]

// A layer's description and the arrays that it points into.
template <class Layer>
struct Bound : Layer {
  nb::list kept;

  const float* vector(const char* what, const nb::object& values, int64_t length) {
    const auto array = nb::cast<In<1>>(values);
    same(what, dim(array, 0), length);
    kept.append(values);
    return array.data();
  }
  Matrix weight(const char* what, const Weight& w, int64_t rows, int64_t cols) {
    const auto& [type, values] = w;
    const auto array = nb::cast<Bytes>(values);
    same(what, dim(array, 0), rows);
    kept.append(values);
    return matrix(type, array, cols);
  }
};

using Delta = Bound<DeltaMixer>;
using Attention = Bound<AttentionMixer>;
using Moe = Bound<MoeDense>;

void make_delta(Delta* at, std::tuple<int64_t, int64_t, int64_t, int64_t> heads, float eps,
                bool int8, const nb::dict& w) {
  Delta& d = *new (at) Delta();
  const auto [key_heads, value_heads, key_dim, value_dim] = heads;
  d.numbers = {eps, int8};
  d.shape = {key_heads, value_heads, key_dim, value_dim};
  if (key_heads < 1 || value_heads < 1 || key_dim < 1 || value_dim < 8 || value_dim % 8)
    fail("the delta rule needs heads and a value size that is a multiple of 8");
  const int64_t channels = d.shape.channels(), inner = value_heads * value_dim;
  d.hidden = dim(nb::cast<In<1>>(w["norm"]), 0);
  d.norm = d.vector("length of norm", w["norm"], d.hidden);
  const auto conv = nb::cast<In<2>>(w["conv"]);
  same("rows of conv", dim(conv, 0), channels);
  d.conv_width = dim(conv, 1);
  if (d.conv_width < 1 || d.conv_width > kMaxTaps)
    fail("a convolution of width " + std::to_string(d.conv_width) + ", must be 1 to " +
         std::to_string(kMaxTaps));
  d.kept.append(w["conv"]);
  d.conv = conv.data();
  d.decay = d.vector("length of decay", w["decay"], value_heads);
  d.dt_bias = d.vector("length of dt_bias", w["dt_bias"], value_heads);
  d.out_norm = d.vector("length of out_norm", w["out_norm"], value_dim);
  const auto weight = [&](const char* name, int64_t rows, int64_t cols) {
    return d.weight(name, nb::cast<Weight>(w[name]), rows, cols);
  };
  d.qkv = weight("qkv", channels, d.hidden);
  d.z = weight("z", inner, d.hidden);
  d.alpha = weight("alpha", value_heads, d.hidden);
  d.beta = weight("beta", value_heads, d.hidden);
  d.output = weight("output", d.hidden, inner);
}

void run_delta(const Delta& d, Out<2> x, Out<2> conv_state, Out<3> memory) {
  same("columns of x", dim(x, 1), d.hidden);
  same("rows of conv_state", dim(conv_state, 0), d.conv_width - 1);
  same("columns of conv_state", dim(conv_state, 1), d.shape.channels());
  same("heads of memory", dim(memory, 0), d.shape.value_heads);
  same("rows of memory", dim(memory, 1), d.shape.key_dim);
  same("columns of memory", dim(memory, 2), d.shape.value_dim);
  nb::gil_scoped_release unlocked;
  d.run(x.data(), dim(x, 0), conv_state.data(), memory.data());
}

void make_attention(Attention* at, std::tuple<int64_t, int64_t, int64_t> heads, int64_t rope_dims,
                    double rope_base, float eps, bool int8, const nb::dict& w) {
  Attention& a = *new (at) Attention();
  a.numbers = {eps, int8};
  std::tie(a.heads, a.kv_heads, a.dim) = heads;
  a.rope_dims = rope_dims;
  a.rope_base = rope_base;
  if (a.kv_heads < 1 || a.heads % a.kv_heads)
    fail(std::to_string(a.heads) + " heads do not share " + std::to_string(a.kv_heads) +
         " kv heads evenly");
  if (a.dim < 8 || a.dim % 8)
    fail("head size " + std::to_string(a.dim) + " is not a multiple of 8");
  if (rope_dims < 0 || rope_dims % 2 || rope_dims > a.dim)
    fail("rope_dims is " + std::to_string(rope_dims) + ", must be even and at most " +
         std::to_string(a.dim));
  a.hidden = dim(nb::cast<In<1>>(w["norm"]), 0);
  a.norm = a.vector("length of norm", w["norm"], a.hidden);
  a.q_norm = a.vector("length of q_norm", w["q_norm"], a.dim);
  a.k_norm = a.vector("length of k_norm", w["k_norm"], a.dim);
  const auto weight = [&](const char* name, int64_t rows, int64_t cols) {
    return a.weight(name, nb::cast<Weight>(w[name]), rows, cols);
  };
  a.q = weight("q", 2 * a.heads * a.dim, a.hidden);
  a.k = weight("k", a.kv_heads * a.dim, a.hidden);
  a.v = weight("v", a.kv_heads * a.dim, a.hidden);
  a.output = weight("output", a.hidden, a.heads * a.dim);
}

void run_attention(const Attention& a, Out<2> x, CacheArray cache_k, CacheArray cache_v,
                   int64_t position0) {
  const Cache c = cache_of(cache_k, cache_v);
  same("columns of x", dim(x, 1), a.hidden);
  same("heads of the cache", c.heads, a.kv_heads);
  same("head size of the cache", c.dim, a.dim);
  check_positions(c, position0, dim(x, 0));
  nb::gil_scoped_release unlocked;
  a.run(x.data(), dim(x, 0), c, position0);
}

void make_moe(Moe* at, float eps, bool int8, const nb::dict& w) {
  Moe& m = *new (at) Moe();
  m.numbers = {eps, int8};
  m.hidden = dim(nb::cast<In<1>>(w["norm"]), 0);
  m.norm = m.vector("length of norm", w["norm"], m.hidden);
  const auto rows_of = [&](const char* name) {
    return dim(nb::cast<Bytes>(std::get<1>(nb::cast<Weight>(w[name]))), 0);
  };
  const auto weight = [&](const char* name, int64_t rows, int64_t cols) {
    return m.weight(name, nb::cast<Weight>(w[name]), rows, cols);
  };
  const int64_t width = rows_of("gate");
  m.router = weight("router", rows_of("router"), m.hidden);
  m.gate = weight("gate", width, m.hidden);
  m.up = weight("up", width, m.hidden);
  m.down = weight("down", m.hidden, width);
  m.scale = weight("scale", 1, m.hidden);
}

void run_route(const Moe& m, In<2> x, Out<2> h, Out<2> scores) {
  same("columns of x", dim(x, 1), m.hidden);
  for (const int i : {0, 1}) same("size of h", dim(h, i), dim(x, i));
  same("rows of scores", dim(scores, 0), dim(x, 0));
  same("columns of scores", dim(scores, 1), m.router.rows);
  nb::gil_scoped_release unlocked;
  m.route(x.data(), dim(x, 0), h.data(), scores.data());
}

void run_shared(const Moe& m, In<2> h, Out<2> out) {
  same("columns of h", dim(h, 1), m.hidden);
  for (const int i : {0, 1}) same("size of out", dim(out, i), dim(h, i));
  nb::gil_scoped_release unlocked;
  m.shared(h.data(), dim(h, 0), out.data());
}

}  // namespace

void bind_layers(nb::module_& m) {
  nb::class_<Delta>(m, "DeltaMixer")
      .def("__init__", &make_delta, "heads"_a, "eps"_a, "int8"_a, "weights"_a)
      .def("run", &run_delta, "x"_a, "conv_state"_a, "memory"_a);
  nb::class_<Attention>(m, "AttentionMixer")
      .def("__init__", &make_attention, "heads"_a, "rope_dims"_a, "rope_base"_a, "eps"_a, "int8"_a,
           "weights"_a)
      .def("run", &run_attention, "x"_a, "cache_k"_a, "cache_v"_a, "position0"_a);
  nb::class_<Moe>(m, "MoeDense")
      .def("__init__", &make_moe, "eps"_a, "int8"_a, "weights"_a)
      .def("route", &run_route, "x"_a, "h"_a, "scores"_a)
      .def("shared", &run_shared, "h"_a, "out"_a);
}

}  // namespace fomoe::cpu
