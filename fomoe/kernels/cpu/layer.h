// The dense parts of a layer, each as one call: a mixer (attention or DeltaNet), the router, the
// shared expert. The arithmetic is that of the operations of drive.h one after the other, so the
// bits are the same; what is saved is a crossing from Python per operation and a division of work
// among the threads per matrix.
//
// Tokens go through in tiles, so working memory does not grow with a prompt.
#pragma once

#include <nanobind/nanobind.h>

#include "drive.h"

namespace fomoe::cpu {

// Tokens of one pass: enough to read weights seldom, few enough for 100 MB of working memory at
// the widest model.
constexpr int64_t kLayerTokens = 256;

// How a layer's weights are multiplied: int8 activations for quantised weights, else float32.
struct LayerNumbers {
  float eps;
  bool int8;
};

// x += W_o gated_norm(delta(conv(W_qkv norm(x))), z)
struct DeltaMixer {
  LayerNumbers numbers;
  DeltaShape shape;
  int64_t hidden, conv_width;
  const float *norm, *conv, *decay, *dt_bias, *out_norm;
  Matrix qkv, z, alpha, beta, output;

  // x [tokens, hidden]; conv_state [conv_width - 1, channels] and memory [value_heads, key_dim,
  // value_dim] move on by `tokens` tokens.
  void run(float* x, int64_t tokens, float* conv_state, float* memory) const;
};

// x += W_o (attention(norm(x)) * sigmoid(gate)); `q` yields query and gate interleaved per head.
struct AttentionMixer {
  LayerNumbers numbers;
  int64_t hidden, heads, kv_heads, dim, rope_dims;
  double rope_base;
  const float *norm, *q_norm, *k_norm;
  Matrix q, k, v, output;

  // The cache takes the positions from `position0` on.
  void run(float* x, int64_t tokens, const Cache& cache, int64_t position0) const;
};

// Router and shared expert.
struct MoeDense {
  LayerNumbers numbers;
  int64_t hidden;
  const float* norm;
  Matrix router, gate, up, down, scale;

  // h [tokens, hidden] = norm(x), scores [tokens, experts] in float32 throughout.
  void route(const float* x, int64_t tokens, float* h, float* scores) const;
  // out = down(silu(gate h) * up h) * sigmoid(scale . h)
  void shared(const float* h, int64_t tokens, float* out) const;
};

void bind_layers(nanobind::module_& m);

}  // namespace fomoe::cpu
