// Vectors of 8 floats and 32 bytes on AVX2 + FMA + F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "half.h"

// The 8 groups of a chunk stay in registers when their loop is unrolled.
#define FOMOE_UNROLL_GROUPS _Pragma("GCC unroll 8")

namespace fomoe::cpu::FOMOE_ISA {

using F8 = __m256;
using I8 = __m256i;
using B32 = __m256i;

inline F8 splat(float x) { return _mm256_set1_ps(x); }
inline F8 zero() { return _mm256_setzero_ps(); }
inline F8 load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
inline void store(float* p, F8 a) { _mm256_storeu_ps(p, a); }
inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline F8 load_n(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline void store_n(float* p, F8 a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a); }
// (a, a, a, a, b, b, b, b) of the floats a, b at p
inline F8 splat_pair(const float* p) {
  double both;
  std::memcpy(&both, p, 8);
  const __m256i pick = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  return _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(both)), pick);
}
// (a0, a0, a1, a1, a2, a2, a3, a3) and the same of a4 to a7
inline F8 low_twice(F8 a) {
  return _mm256_permutevar8x32_ps(a, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}
inline F8 high_twice(F8 a) {
  return _mm256_permutevar8x32_ps(a, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
}
// out[w] = element w of 8 rows of 4 floats at p
inline void transpose_8x4(const float* p, F8* out) {
  __m256 row[4];  // rows i and i + 4
  for (int i = 0; i < 4; ++i)
    row[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 4 * i)),
                                  _mm_loadu_ps(p + 16 + 4 * i), 1);
  const __m256 a = _mm256_unpacklo_ps(row[0], row[1]), b = _mm256_unpacklo_ps(row[2], row[3]);
  const __m256 c = _mm256_unpackhi_ps(row[0], row[1]), d = _mm256_unpackhi_ps(row[2], row[3]);
  out[0] = _mm256_shuffle_ps(a, b, _MM_SHUFFLE(1, 0, 1, 0));
  out[1] = _mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 2, 3, 2));
  out[2] = _mm256_shuffle_ps(c, d, _MM_SHUFFLE(1, 0, 1, 0));
  out[3] = _mm256_shuffle_ps(c, d, _MM_SHUFFLE(3, 2, 3, 2));
}
inline F8 add(F8 a, F8 b) { return _mm256_add_ps(a, b); }
inline F8 sub(F8 a, F8 b) { return _mm256_sub_ps(a, b); }
inline F8 mul(F8 a, F8 b) { return _mm256_mul_ps(a, b); }
inline F8 div(F8 a, F8 b) { return _mm256_div_ps(a, b); }
inline F8 fma(F8 a, F8 b, F8 c) { return _mm256_fmadd_ps(a, b, c); }
// The second operand where one is NaN.
inline F8 max(F8 a, F8 b) { return _mm256_max_ps(a, b); }
inline F8 min(F8 a, F8 b) { return _mm256_min_ps(a, b); }
inline F8 abs(F8 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline F8 round_even(F8 a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline I8 to_int(F8 a) { return _mm256_cvttps_epi32(a); }
inline F8 to_float(I8 a) { return _mm256_cvtepi32_ps(a); }
// a * 2^n for lanes whose result is a normal number
inline F8 scale_by_power(F8 a, I8 n) {
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(bits));
}
inline float first(F8 a) { return _mm256_cvtss_f32(a); }

inline float sum(F8 a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lane(F8 a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// 8 half or brain floats at any byte address
inline F8 load_f16(const void* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline F8 load_bf16(const void* p) {
  const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline void store_f16(uint16_t* p, F8 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline float half_scalar(uint16_t h) { return _cvtsh_ss(h); }
// 8 half floats, `stride` bytes apart
inline F8 load_f16_apart(const uint8_t* p, int stride) {
  const auto at = [&](int i) {
    int16_t h;
    std::memcpy(&h, p + i * stride, 2);
    return h;
  };
  return _mm256_cvtph_ps(_mm_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)));
}

inline B32 bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_bytes(void* p, B32 a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
inline B32 splat_byte(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
inline B32 and_(B32 a, B32 b) { return _mm256_and_si256(a, b); }
inline B32 or_(B32 a, B32 b) { return _mm256_or_si256(a, b); }
inline B32 subtract(B32 a, B32 b) { return _mm256_sub_epi8(a, b); }
// Bits of the neighbouring byte come in: callers mask them away.
template <int N>
inline B32 shift_right(B32 a) {
  return _mm256_srli_epi16(a, N);
}
template <int N>
inline B32 shift_left(B32 a) {
  return _mm256_slli_epi16(a, N);
}
// 16 bytes -> their low nibbles, then their high nibbles
inline B32 nibbles(const uint8_t* p) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const B32 both = _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_srli_epi16(low, 4), 1);
  return and_(both, splat_byte(15));
}
// byte i = value where bit i of the 4 bytes at p is set, else 0
inline B32 spread_bits(const uint8_t* p, int value) {
  int32_t word;
  std::memcpy(&word, p, 4);
  const __m256i source =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(word), source);
  return and_(_mm256_cmpeq_epi8(and_(spread, bit), bit), splat_byte(value));
}
inline B32 flip_top_bit(B32 a) { return _mm256_xor_si256(a, splat_byte(128)); }
inline B32 look_up(B32 index, const uint8_t* table) {
  const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(row), index);
}

// the 8 int8 of a little-endian word as floats
inline F8 from_int8(uint64_t word) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(word))));
}
// 8 lanes, each an integer in [-127, 127], to 8 int8 at p
inline void store_int8(int8_t* p, F8 a) {
  const __m256i wide = _mm256_cvtps_epi32(a);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

}  // namespace fomoe::cpu::FOMOE_ISA
