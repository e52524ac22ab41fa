// Integer products and panels of 8 rows in portable C++.
#pragma once

#include "simd.h"

namespace fomoe::cpu::FOMOE_ISA {

// Lane j = sum over i of w[4 j + i] * x[4 j + i]; x int8 in [-127, 127].
inline I8 dot_unsigned(B32 w, B32 x) {
  I8 r;
  for (int j = 0; j < 8; ++j) {
    int32_t s = 0;
    for (int i = 0; i < 4; ++i) s += w.v[4 * j + i] * static_cast<int8_t>(x.v[4 * j + i]);
    r.v[j] = s;
  }
  return r;
}
// Products of quants that carry a bias, which is left in them.
template <int Bias>
constexpr int kBiasLeft = Bias;
template <int Bias>
inline I8 product(B32 w, B32 x) {
  return dot_unsigned(w, x);
}
// lane i = the sum of the 8 lanes of v[i]
inline I8 sums_of_8(const I8* v) {
  return make<I8>([&](int i) {
    int32_t s = 0;
    for (const int32_t lane : v[i].v) s += lane;
    return s;
  });
}
// lanes 2 i and 2 i + 1 = the sums of the lower and the upper 4 lanes of v[i]
inline I8 half_sums_of_4(const I8* v) {
  return make<I8>([&](int i) {
    const int32_t* const lane = v[i / 2].v + i % 2 * 4;
    return lane[0] + lane[1] + lane[2] + lane[3];
  });
}

constexpr int kRows = 8;
constexpr int kFloatRows = 1;  // that share a pass over float32 activations
constexpr int kTileTokens = 4;
constexpr bool kBitsMatter = false;
using RowFloats = F8;
using RowInts = I8;
using RowBytes = B32;  // a dword of each row

inline RowBytes row_bytes(int x) { return splat_byte(x); }
inline void row_store(uint8_t* p, RowBytes a) { store_bytes(p, a); }
// Right by N bits, left where negative; callers mask away what comes in from neighbouring bytes.
template <int N>
inline RowBytes row_shift(RowBytes a) {
  if constexpr (N < 0) return shift_left<-N>(a);
  return shift_right<(N > 0 ? N : 0)>(a);
}

inline RowFloats row_zero() { return zero(); }
inline RowFloats row_load(const void* p) { return load(p); }
inline void row_store(float* p, RowFloats a) { store(p, a); }
inline RowFloats row_splat(const float* p) { return splat(*p); }
inline RowFloats row_float(RowInts a) { return to_float(a); }
inline RowInts row_int_zero() { return RowInts{}; }
inline RowInts row_int_splat(const int32_t* p) {
  return make<I8>([&](int) { return *p; });
}

// 16 bytes of each row of a panel, `stride` apart, to 4 vectors of one dword per row.
inline void transpose_rows(const uint8_t* p, int64_t stride, RowBytes* out) {
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < 4; ++i) std::memcpy(out[i].v + 4 * r, p + r * stride + 4 * i, 4);
}

// dot[t] += dots of `Dwords` dwords of quants of each row at w with those of token t at x.
template <int Bits, int Dwords, int N>
inline void row_dots(const uint8_t* w, const int8_t* x, RowInts* dot) {
  for (int t = 0; t < N; ++t)
    for (int d = 0; d < Dwords; ++d)
      for (int i = 0; i < 4 * kRows; ++i)
        dot[t].v[i / 4] += w[4 * kRows * d + i] * x[4 * (Dwords * t + d) + i % 4];
}

}  // namespace fomoe::cpu::FOMOE_ISA
