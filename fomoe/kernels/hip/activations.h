// What comes before products of one token: a vector in shared memory in the form and the order that
// the weights' format wants, normalised and rounded to int8 by each group for itself.
#pragma once
#include "tiles.h"

// A float vector spread over the group, 4 values a thread at a time.
template <int kCols>
struct Spread {
  static constexpr int kQuads = kCols / 4, kEach = ceil_div(kQuads, kThreads);
  static_assert(kCols % 32 == 0, "whole blocks of 32");
  fm_f4 at[kEach];

  FM_DEV void read(const float* x) {
    FM_UNROLL for (int j = 0; j < kEach; ++j) {
      const int quad = (int)threadIdx.x + j * kThreads;
      at[j] = quad < kQuads ? ((const fm_f4*)x)[quad] : fm_f4{0.0f, 0.0f, 0.0f, 0.0f};
    }
  }
};

FM_DEV float dot(const fm_f4& a, const fm_f4& b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

// x := x * weight / sqrt(mean(x^2) + eps); `scratch` are FM_WAVES floats of shared memory.
template <int kCols>
FM_DEV void normalise(Spread<kCols>& x, const Spread<kCols>& weight, float eps, float* scratch) {
  float squares = 0.0f;
  FM_UNROLL for (int j = 0; j < Spread<kCols>::kEach; ++j) squares += dot(x.at[j], x.at[j]);
  squares = fm_wave_sum(squares);
  if (fm_lane() == 0) scratch[threadIdx.x / FM_WAVE] = squares;
  fm_barrier();
  float total = 0.0f;
  FM_UNROLL for (int i = 0; i < FM_WAVES; ++i) total += scratch[i];
  const float scale = 1.0f / fm_sqrt(total / (float)kCols + eps);
  FM_UNROLL for (int j = 0; j < Spread<kCols>::kEach; ++j) {
    fm_f4 &v = x.at[j], w = weight.at[j];
    v = fm_f4{v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w};
  }
}

// 4 of 32 values as int8, with the scale of the 32 and its product with their sum.
struct Quantised {
  unsigned word;
  fm_f2 scale;
};

// x / d to the nearest int, ties to even, as the low byte of the result; `r` is 1 / d.
//
// Two corrections of x * r give the quotient as division rounds it (P. Markstein, "Computation of
// elementary functions on the IBM RISC System/6000 processor", theorem 8). 1.5 * 2^23 more, and its
// fraction has no bits behind the point: the integer stands in the low ones.
FM_DEV unsigned byte_of(float x, float d, float r) {
  float q = x * r;
  q = fm_fma(fm_fma(-q, d, x), r, q);
  q = fm_fma(fm_fma(-q, d, x), r, q);
  return fm_bits<unsigned>(q + 12582912.0f) & 0xff;
}

// Eight neighbouring lanes have the 32 values; all lanes of the wave come here.
FM_DEV Quantised quantise(const fm_f4& v) {
  float most = fm_max(fm_max(fm_abs(v.x), fm_abs(v.y)), fm_max(fm_abs(v.z), fm_abs(v.w)));
  FM_UNROLL for (int mask = 4; mask; mask /= 2) most = fm_max(most, fm_wave_xor(most, mask));
  const float d = most / 127.0f;
  Quantised q;
  // The corrections of tiny values would lose bits: both sides of the quotient are lifted.
  const float lift = d > 1e-25f ? 1.0f : 0x1p80f, by = d * lift, r = d > 0.0f ? 1.0f / by : 0.0f;
  const auto byte = [&](float x) { return byte_of(x * lift, by, r); };
  q.word = byte(v.x) | byte(v.y) << 8 | byte(v.z) << 16 | byte(v.w) << 24;
  int sum = fm_dp4a((int)q.word, 0x01010101, 0);
  FM_UNROLL for (int mask = 4; mask; mask /= 2) sum += fm_wave_xor(sum, mask);
  q.scale = fm_f2{d, d * (float)sum};
  return q;
}

// Puts quad `quad` of a vector of kCols values where F::load looks for it.
template <class F, int kCols>
FM_DEV void put_quad(const Input& x, int quad, const Quantised& q, const fm_f4& value) {
  constexpr int kPieces = RowTiles<F, kCols>::kPieces;
  if (!F::kInt8) {
    ((fm_f4*)x.runs)[F::slot(quad, kPieces)] = value;
    return;
  }
  ((unsigned*)(x.runs + F::slot(quad / 4, kPieces)))[quad % 4] = q.word;
  if (quad % 8 == 0) x.scales[quad / 8] = q.scale;
}

// Bytes of shared memory for a vector of kCols values in format F, a multiple of 16, and its parts.
template <class F, int kCols>
struct InputSize {
  static constexpr int kRunBytes = F::kInt8 ? kCols : 4 * kCols;
  static constexpr int kBytes = kRunBytes + (F::kInt8 ? ceil_div(kCols, 64) * 16 : 0);
  FM_DEV static Input in(char* memory) { return {(fm_u4*)memory, (fm_f2*)(memory + kRunBytes)}; }
};

// Where activations lie in device memory: float, or int8 with (d, d * sum) of each 32.
struct Rows {
  const float* x;
  const signed char* q;
  const fm_f2* s;
};

// Copies one row in the form that F wants.
template <class F, int kCols>
FM_DEV void take_row(const Input& to, const Rows& from) {
  constexpr int kPieces = RowTiles<F, kCols>::kPieces;
  constexpr int kRuns = InputSize<F, kCols>::kRunBytes / 16;
  const fm_u4* const runs = F::kInt8 ? (const fm_u4*)from.q : (const fm_u4*)from.x;
  for (int run = threadIdx.x; run < kRuns; run += kThreads) to.runs[F::slot(run, kPieces)] = runs[run];
  if (!F::kInt8) return;
  for (int i = threadIdx.x; i < kCols / 32; i += kThreads) to.scales[i] = from.s[i];
}
