// Kernels that look at other positions: causal convolution, gated delta rule.
#pragma once

#include <type_traits>

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

// Two or more tokens on the columns of a tile [key_dim, kDeltaTile] of the state, from `column` on.
// As delta_columns, but a row of the state is read and written once per token: the last pass of a
// token makes the first one of the next. Wider vectors than these are slower (Zen 4).
inline void delta_tile(const DeltaHead& h, int64_t column, float* tile) {
  constexpr int vectors = kDeltaTile / 8;
  F8 d[vectors], next[vectors], out[vectors];
  // The factors of a token and, if there is one more, its successor's decay and key.
  const auto pass = [&](int64_t t, bool first, bool last) __attribute__((always_inline)) {
    const float* const q = h.q + t * h.qk_stride;
    const float* const k = h.k + t * h.qk_stride;
    const float* const key = last ? k : first ? k : k + h.qk_stride;
    const F8 decay = splat(last ? 1.0f : h.decay[(first ? t : t + 1) * h.gate_stride]);
    for (int64_t i = 0; i < h.key_dim; ++i) {
      const F8 k_i = splat(k[i]), q_i = splat(q[i]), key_i = splat(key[i]);
      for (int n = 0; n < vectors; ++n) {
        float* const at = tile + i * kDeltaTile + 8 * n;
        F8 s = load(at);
        if (!first) {
          s = fma(k_i, d[n], s);
          out[n] = fma(q_i, s, out[n]);
        }
        if (!last) {
          s = mul(s, decay);
          next[n] = fma(key_i, s, next[n]);
        }
        store(at, s);
      }
    }
  };
  const auto clear = [](F8* sums) {
    for (int n = 0; n < vectors; ++n) sums[n] = splat(0.0f);
  };
  clear(next);
  pass(0, true, false);
  for (int64_t t = 0; t < h.tokens; ++t) {
    const F8 beta = splat(h.beta[t * h.gate_stride]);
    const float* const v = h.v + t * h.v_stride + column;
    for (int n = 0; n < vectors; ++n) d[n] = mul(beta, sub(load(v + 8 * n), next[n]));
    clear(next);
    clear(out);
    if (t + 1 < h.tokens)
      pass(t, false, false);
    else
      pass(t, false, true);
    for (int n = 0; n < vectors; ++n) store(h.out + t * h.out_stride + column + 8 * n, out[n]);
  }
}

inline void delta_head(const DeltaHead& h, int64_t begin, int64_t end, float* memory) {
  // One token on 8 V columns in place.
  const auto in_place = [&](int64_t t, int64_t column, auto vectors) {
    delta_columns<decltype(vectors)::value>(h.q + t * h.qk_stride, h.k + t * h.qk_stride,
                                            h.decay[t * h.gate_stride], h.beta[t * h.gate_stride],
                                            h.v + t * h.v_stride + column, h.key_dim, h.value_dim,
                                            h.state + column, h.out + t * h.out_stride + column);
  };
  int64_t c = begin;
  for (; c + kDeltaTile <= end; c += kDeltaTile) {
    if (h.tokens == 1) {
      in_place(0, c, std::integral_constant<int, kDeltaTile / 8>{});
      continue;
    }
    // Rows of a state lie a power of two apart and would push each other out of L1.
    constexpr size_t row_bytes = kDeltaTile * sizeof(float);
    for (int64_t i = 0; i < h.key_dim; ++i)
      std::memcpy(memory + i * kDeltaTile, h.state + i * h.value_dim + c, row_bytes);
    delta_tile(h, c, memory);
    for (int64_t i = 0; i < h.key_dim; ++i)
      std::memcpy(h.state + i * h.value_dim + c, memory + i * kDeltaTile, row_bytes);
  }
  for (; c < end; c += 8)
    for (int64_t t = 0; t < h.tokens; ++t) in_place(t, c, std::integral_constant<int, 1>{});
}

}  // namespace fomoe::cpu::FOMOE_ISA
