// Integer products on AVX2, which has no byte product of its own, and panels of 8 rows.
#pragma once

#include "simd.h"

namespace fomoe::cpu::FOMOE_ISA {

// Lane j = sum over i of w[4 j + i] * x[4 j + i]; x int8 in [-127, 127]. The 16-bit sums of
// neighbours stay below 2 * 128 * 127 < 2^15 for the signed form and the unsigned one (w <= 128).
inline I8 dot_unsigned(B32 w, B32 x) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
}
inline I8 dot_signed(B32 w, B32 x) {
  return dot_unsigned(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
// Products of quants that carry a bias. Where they fill 8 bits the bias goes before the product,
// for the 16-bit sums of the unsigned form would not hold them.
template <int Bias>
constexpr int kBiasLeft = Bias == 128 ? 0 : Bias;
template <int Bias>
inline I8 product(B32 w, B32 x) {
  if constexpr (Bias == 128) return dot_signed(flip_top_bit(w), x);
  return dot_unsigned(w, x);
}
// lane i = the sum of the 8 lanes of v[i]
FOMOE_INLINE I8 sums_of_8(const I8* v) {
  const I8 a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  const I8 b = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                          _mm256_permute2x128_si256(a, b, 0x31));
}
// lanes 2 i and 2 i + 1 = the sums of the lower and the upper 4 lanes of v[i]
FOMOE_INLINE I8 half_sums_of_4(const I8* v) {
  const I8 a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  return _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

constexpr int kRows = 8;
constexpr int kFloatRows = 1;  // that share a pass over float32 activations
constexpr int kTileTokens = 4;
constexpr bool kBitsMatter = true;  // to row_dots
using RowFloats = __m256;
using RowInts = __m256i;
using RowBytes = B32;  // a dword of each row

inline RowBytes row_bytes(int x) { return splat_byte(x); }
inline void row_store(uint8_t* p, RowBytes a) { store_bytes(p, a); }
// Right by N bits, left where negative; callers mask away what comes in from neighbouring bytes.
template <int N>
inline RowBytes row_shift(RowBytes a) {
  if constexpr (N < 0) return shift_left<-N>(a);
  return shift_right<(N > 0 ? N : 0)>(a);
}

inline RowFloats row_zero() { return _mm256_setzero_ps(); }
inline RowFloats row_load(const void* p) { return load(p); }
inline void row_store(float* p, RowFloats a) { store(p, a); }
inline RowFloats row_splat(const float* p) { return splat(*p); }
inline RowFloats row_float(RowInts a) { return to_float(a); }
inline RowInts row_int_zero() { return _mm256_setzero_si256(); }
inline RowInts row_int_splat(const int32_t* p) { return _mm256_set1_epi32(*p); }

// 16 bytes of each row of a panel, `stride` apart, to 4 vectors of one dword per row.
FOMOE_INLINE void transpose_rows(const uint8_t* p, int64_t stride, RowBytes* out) {
  __m256i a[4];  // halves: rows r and r + 4
  for (int r = 0; r < 4; ++r) {
    const auto* const low = reinterpret_cast<const __m128i*>(p + r * stride);
    const auto* const high = reinterpret_cast<const __m128i*>(p + (r + 4) * stride);
    a[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)),
                                   _mm_loadu_si128(high), 1);
  }
  const __m256i low01 = _mm256_unpacklo_epi32(a[0], a[1]),
                low23 = _mm256_unpacklo_epi32(a[2], a[3]);
  const __m256i top01 = _mm256_unpackhi_epi32(a[0], a[1]),
                top23 = _mm256_unpackhi_epi32(a[2], a[3]);
  out[0] = _mm256_unpacklo_epi64(low01, low23);
  out[1] = _mm256_unpackhi_epi64(low01, low23);
  out[2] = _mm256_unpacklo_epi64(top01, top23);
  out[3] = _mm256_unpackhi_epi64(top01, top23);
}

// dot[t] += dots of `Dwords` dwords of quants of each row at w with those of token t at x. Quants
// of few bits are summed in 16 bits as long as 2 * 127 * (2^Bits - 1) per dword fits.
template <int Bits, int Dwords, int N>
FOMOE_INLINE void row_dots(const uint8_t* w, const int8_t* x, RowInts* dot) {
  constexpr int fit = Bits <= 4 ? 8 : Bits == 5 ? 4 : Bits == 6 ? 2 : 1;
  constexpr int together = fit < Dwords ? fit : Dwords;
  for (int d = 0; d < Dwords; d += together) {
    __m256i pairs[N];
    for (int i = 0; i < together; ++i) {
      const __m256i q = Bits == 8 ? flip_top_bit(bytes(w + 32 * (d + i))) : bytes(w + 32 * (d + i));
      const __m256i size = Bits == 8 ? _mm256_abs_epi8(q) : q;
      for (int t = 0; t < N; ++t) {
        int32_t word;
        std::memcpy(&word, x + 4 * (Dwords * t + d + i), 4);
        const __m256i value = _mm256_set1_epi32(word);
        const __m256i product =
            _mm256_maddubs_epi16(size, Bits == 8 ? _mm256_sign_epi8(value, q) : value);
        pairs[t] = i == 0 ? product : _mm256_add_epi16(pairs[t], product);
      }
    }
    for (int t = 0; t < N; ++t)
      dot[t] = _mm256_add_epi32(dot[t], _mm256_madd_epi16(pairs[t], _mm256_set1_epi16(1)));
  }
}

}  // namespace fomoe::cpu::FOMOE_ISA
