// Kernels that look at other positions: causal convolution, gated delta rule.
#pragma once

#include "floats16.h"
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

// Columns of a state [key_dim, N * Lanes].
struct StateColumns {
  float* data;
  int64_t stride;
};

// The numbers of one token that a pass over the state multiplies rows with.
struct DeltaStep {
  const float *q, *k;
  float decay;
};

template <int N, int Lanes>
using Columns = typename Vector<Lanes>::type[N];

// S = S * decay, d = S^T k
template <int N, int Lanes>
FOMOE_INLINE void delta_open(const DeltaStep& now, int64_t key_dim, StateColumns from,
                             StateColumns to, Columns<N, Lanes>& d) {
  using From = Vector<Lanes>;
  const auto decay = From::splat(now.decay);
  for (auto& x : d) x = From::splat(0.0f);
  for (int64_t i = 0; i < key_dim; ++i) {
    const auto k = From::splat(now.k[i]);
    for (int n = 0; n < N; ++n) {
      const auto s = mul(From::load(from.data + i * from.stride + n * Lanes), decay);
      store(to.data + i * to.stride + n * Lanes, s);
      d[n] = fma(k, s, d[n]);
    }
  }
}

// S = S + k d^T, o = S^T q; unless it is the last token also the next one's S = S * decay and
// d = S^T k: one pass over the state per token.
template <int N, int Lanes, bool Last>
FOMOE_INLINE void delta_step(const DeltaStep& now, const DeltaStep& next, int64_t key_dim,
                             StateColumns from, StateColumns to, Columns<N, Lanes>& d,
                             Columns<N, Lanes>& o) {
  using From = Vector<Lanes>;
  Columns<N, Lanes> next_d;
  for (int n = 0; n < N; ++n) o[n] = next_d[n] = From::splat(0.0f);
  const auto decay = From::splat(next.decay);
  for (int64_t i = 0; i < key_dim; ++i) {
    const auto k = From::splat(now.k[i]), q = From::splat(now.q[i]);
    const auto next_k = From::splat(next.k[i]);
    for (int n = 0; n < N; ++n) {
      auto s = fma(k, d[n], From::load(from.data + i * from.stride + n * Lanes));
      o[n] = fma(q, s, o[n]);
      if constexpr (!Last) {
        s = mul(s, decay);
        next_d[n] = fma(next_k, s, next_d[n]);
      }
      store(to.data + i * to.stride + n * Lanes, s);
    }
  }
  for (int n = 0; n < N; ++n) d[n] = next_d[n];
}

// All tokens on the columns [column, column + N * Lanes) of a state, which between tokens lies in
// `memory`: rows of the state are a power of two apart and would push each other out of L1.
template <int N, int Lanes>
inline void delta_columns(const DeltaHead& h, int64_t column, float* memory) {
  using From = Vector<Lanes>;
  const StateColumns state{h.state + column, h.value_dim}, tile{memory, N * Lanes};
  const auto at = [&](int64_t t) {
    return DeltaStep{h.q + t * h.qk_stride, h.k + t * h.qk_stride, h.decay[t * h.gate_stride]};
  };
  Columns<N, Lanes> d, o;
  delta_open<N, Lanes>(at(0), h.key_dim, state, tile, d);
  for (int64_t t = 0; t < h.tokens; ++t) {
    const float* const v = h.v + t * h.v_stride + column;
    const auto beta = From::splat(h.beta[t * h.gate_stride]);
    for (int n = 0; n < N; ++n) d[n] = mul(beta, sub(From::load(v + n * Lanes), d[n]));
    if (t + 1 < h.tokens)
      delta_step<N, Lanes, false>(at(t), at(t + 1), h.key_dim, tile, tile, d, o);
    else
      delta_step<N, Lanes, true>(at(t), at(t), h.key_dim, tile, state, d, o);
    for (int n = 0; n < N; ++n) store(h.out + t * h.out_stride + column + n * Lanes, o[n]);
  }
}

// The only token on the columns [column, column + N * Lanes) of a state.
template <int N, int Lanes>
inline void delta_alone(const DeltaHead& h, int64_t column) {
  using From = Vector<Lanes>;
  float* const state = h.state + column;
  const auto decay = From::splat(h.decay[0]), beta = From::splat(h.beta[0]);
  Columns<N, Lanes> d, o;
  for (int n = 0; n < N; ++n) d[n] = o[n] = From::splat(0.0f);
  for (int64_t i = 0; i < h.key_dim; ++i) {
    const auto k = From::splat(h.k[i]);
    for (int n = 0; n < N; ++n)
      d[n] = fma(k, mul(From::load(state + i * h.value_dim + n * Lanes), decay), d[n]);
  }
  for (int n = 0; n < N; ++n) d[n] = mul(beta, sub(From::load(h.v + column + n * Lanes), d[n]));
  for (int64_t i = 0; i < h.key_dim; ++i) {
    const auto k = From::splat(h.k[i]), q = From::splat(h.q[i]);
    for (int n = 0; n < N; ++n) {
      float* const at = state + i * h.value_dim + n * Lanes;
      const auto s = fma(k, d[n], mul(From::load(at), decay));
      store(at, s);
      o[n] = fma(q, s, o[n]);
    }
  }
  for (int n = 0; n < N; ++n) store(h.out + column + n * Lanes, o[n]);
}

// All columns for the only token: the state comes from memory, which gives nearly twice as much
// when rows are read from end to end; hence as many columns at a time as registers hold.
inline void delta_token(const DeltaHead& h) {
  constexpr int64_t wide = kWideRegisters ? 128 : 64;
  int64_t c = 0;
  for (; c + wide <= h.value_dim; c += wide) delta_alone<wide / 16, 16>(h, c);
  for (; c + 32 <= h.value_dim; c += 32) delta_alone<2, 16>(h, c);
  for (; c < h.value_dim; c += 8) delta_alone<1, 8>(h, c);
}

inline void delta_head(const DeltaHead& h, int64_t begin, int64_t end, float* memory) {
  constexpr int64_t wide = 32;
  int64_t c = begin;
  // Vectors of 8 in every set: there are no fewer passes with 16, and the shorter ones are as fast.
  for (; c + wide <= end; c += wide) delta_columns<wide / 8, 8>(h, c, memory);
  for (; c < end; c += 8) delta_columns<1, 8>(h, c, memory);
}

}  // namespace fomoe::cpu::FOMOE_ISA
