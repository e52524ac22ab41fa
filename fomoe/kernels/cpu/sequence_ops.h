// Kernels that look at other positions: causal convolution, gated delta rule.
#pragma once

#include "vector_ops.h"

namespace fomoe::cpu::FOMOE_ISA {

// taps[w] = tap w of the 8 (or fewer) channels whose weights [lanes, width] begin at p.
inline void load_taps(const float* p, int64_t width, int lanes, F8* taps) {
  if (width == 4 && lanes == 8) return transpose_8x4(p, taps);
  for (int64_t w = 0; w < width; ++w) {
    float eight[8];
    for (int i = 0; i < lanes; ++i) eight[i] = p[i * width + w];
    taps[w] = load_upto(eight, lanes);
  }
}

// `state` [width - 1, channels] holds the inputs before token 0, oldest first. At most
// kConvPiece channels; tokens outside, channels inside, so that memory is read in rows.
inline void conv_silu(const float* x, const float* weight, float* state, int64_t tokens,
                      int64_t channels, int64_t width, int64_t begin, int64_t end, float* out) {
  const int64_t past = width - 1;
  F8 taps[kConvPiece / 8][kMaxTaps];
  by_eights(end - begin, [&](int64_t i, int lanes) {
    load_taps(weight + (begin + i) * width, width, lanes, taps[i / 8]);
  });
  const auto input = [&](int64_t t) {  // t counts from the oldest remembered input
    return t < past ? state + t * channels : x + (t - past) * channels;
  };
  for (int64_t t = 0; t < tokens; ++t)
    by_eights(end - begin, [&](int64_t i, int lanes) {
      const int64_t c = begin + i;
      F8 acc = zero();
      for (int64_t w = 0; w < width; ++w)
        acc = fma(taps[i / 8][w], load_upto(input(t + w) + c, lanes), acc);
      store_upto(out + t * channels + c, silu(acc), lanes);
    });
  for (int64_t t = 0; t < past; ++t)  // ascending: reads only rows that are not yet overwritten
    std::memmove(state + t * channels + begin, input(tokens + t) + begin,
                 static_cast<size_t>(end - begin) * sizeof(float));
}

// One step per token on 8 V columns of the state: S = S * decay, d = beta * (v - S^T k),
// S = S + k d^T, out = S^T q.
template <int V>
inline void delta_columns(const float* q, const float* k, float decay, float beta, const float* v,
                          int64_t key_dim, int64_t stride, float* state, float* out) {
  F8 d[V], o[V];
  for (int n = 0; n < V; ++n) d[n] = o[n] = zero();
  for (int64_t i = 0; i < key_dim; ++i)
    for (int n = 0; n < V; ++n) {
      const F8 s = mul(load(state + i * stride + 8 * n), splat(decay));
      d[n] = fma(splat(k[i]), s, d[n]);
    }
  for (int n = 0; n < V; ++n) d[n] = mul(splat(beta), sub(load(v + 8 * n), d[n]));
  for (int64_t i = 0; i < key_dim; ++i)
    for (int n = 0; n < V; ++n) {
      float* at = state + i * stride + 8 * n;
      const F8 s = fma(splat(k[i]), d[n], mul(load(at), splat(decay)));
      store(at, s);
      o[n] = fma(splat(q[i]), s, o[n]);
    }
  for (int n = 0; n < V; ++n) store(out + 8 * n, o[n]);
}

// All tokens on the 8 V columns of a state [key_dim, stride]; q, k, v, out as in delta_head.
template <int V>
inline void delta_tokens(const DeltaHead& h, int64_t column, float* state, int64_t stride) {
  for (int64_t t = 0; t < h.tokens; ++t)
    delta_columns<V>(h.q + t * h.qk_stride, h.k + t * h.qk_stride, h.decay[t * h.gate_stride],
                     h.beta[t * h.gate_stride], h.v + t * h.v_stride + column, h.key_dim, stride,
                     state, h.out + t * h.out_stride + column);
}

inline void delta_head(const DeltaHead& h, int64_t begin, int64_t end, float* memory) {
  constexpr int64_t wide = 32;
  int64_t c = begin;
  for (; c + wide <= end; c += wide) {
    if (h.tokens == 1) {
      delta_tokens<4>(h, c, h.state + c, h.value_dim);
      continue;
    }
    // Rows of a state lie a power of two apart and would push each other out of L1.
    for (int64_t i = 0; i < h.key_dim; ++i)
      std::memcpy(memory + i * wide, h.state + i * h.value_dim + c, wide * sizeof(float));
    delta_tokens<4>(h, c, memory, wide);
    for (int64_t i = 0; i < h.key_dim; ++i)
      std::memcpy(h.state + i * h.value_dim + c, memory + i * wide, wide * sizeof(float));
  }
  for (; c < end; c += 8) delta_tokens<1>(h, c, h.state + c, h.value_dim);
}

}  // namespace fomoe::cpu::FOMOE_ISA
