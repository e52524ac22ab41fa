// Wide vectors and panels of 16 rows on AVX-512 with VNNI.
#pragma once

#include "simd.h"

namespace fomoe::cpu::FOMOE_ISA {

struct B64 {
  __m512i v;
};
using W16 = __m512;

inline B64 join(B32 a, B32 b) { return {_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1)}; }
inline B64 load_64(const void* p) { return {_mm512_loadu_si512(p)}; }
// 32 bytes in both halves
inline B64 load_twice(const void* p) { return {_mm512_broadcast_i64x4(bytes(p))}; }
inline B64 splat_64(int x) { return {_mm512_set1_epi8(static_cast<char>(x))}; }
inline B64 and_(B64 a, B64 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline B64 or_(B64 a, B64 b) { return {_mm512_or_si512(a.v, b.v)}; }
inline B64 subtract(B64 a, B64 b) { return {_mm512_sub_epi8(a.v, b.v)}; }
inline B64 flip_top_bit(B64 a) { return {_mm512_xor_si512(a.v, splat_64(128).v)}; }
// The halves shifted right by A and B bits (left where negative); callers mask away what comes in
// from neighbouring bytes.
template <int A, int B>
inline B64 shift_halves(B64 a) {
  constexpr auto both = [](int n) { return static_cast<short>(n); };
  if constexpr (A >= 0 && B >= 0) {
    if constexpr (A == B) return {_mm512_srli_epi16(a.v, A)};
    return {_mm512_srlv_epi16(a.v, join(_mm256_set1_epi16(both(A)), _mm256_set1_epi16(both(B))).v)};
  }
  static_assert(A * B >= 0, "one direction for both halves");
  return {_mm512_sllv_epi16(a.v, join(_mm256_set1_epi16(both(-A)), _mm256_set1_epi16(both(-B))).v)};
}
// 16 bytes at a and at b: low nibbles, then high nibbles, of each
inline B64 nibbles(const uint8_t* a, const uint8_t* b) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
  const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
  const __m512i twice = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(first), 0xff00, second);
  const __m512i shifts = _mm512_set_epi64(0x0004000400040004, 0x0004000400040004, 0, 0,
                                          0x0004000400040004, 0x0004000400040004, 0, 0);
  return and_({_mm512_srlv_epi16(twice, shifts)}, splat_64(15));
}
inline B64 spread_bits(const uint8_t* a, const uint8_t* b, int value) {
  uint32_t first, second;
  std::memcpy(&first, a, 4);
  std::memcpy(&second, b, 4);
  const __mmask64 set = first | static_cast<uint64_t>(second) << 32;
  return {_mm512_maskz_mov_epi8(set, splat_64(value).v)};
}
inline B64 look_up(B64 index, const uint8_t* table) {
  const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(row), index.v)};
}
inline void store_64(uint8_t* p, B64 a) { _mm512_storeu_si512(p, a.v); }

inline W16 join(F8 a, F8 b) {
  const __m512d low = _mm512_castps_pd(_mm512_castps256_ps512(a));
  return _mm512_castpd_ps(_mm512_insertf64x4(low, _mm256_castps_pd(b), 1));
}
inline void store(float* p, W16 a) { _mm512_storeu_ps(p, a); }
inline W16 add(W16 a, W16 b) { return _mm512_add_ps(a, b); }
inline W16 sub(W16 a, W16 b) { return _mm512_sub_ps(a, b); }
inline W16 mul(W16 a, W16 b) { return _mm512_mul_ps(a, b); }
inline W16 fma(W16 a, W16 b, W16 c) { return _mm512_fmadd_ps(a, b, c); }
inline F8 low_half(W16 a) { return _mm512_castps512_ps256(a); }
inline F8 high_half(W16 a) {
  return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
}
// the 16 int8 of two little-endian words as floats
inline W16 from_int8(uint64_t low, uint64_t high) {
  const __m128i all = _mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(all));
}
// (a0, a0, a1, a1, ...)
inline W16 twice_each(F8 a) {
  const __m512i pick = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return _mm512_permutexvar_ps(pick, _mm512_castps256_ps512(a));
}
// The half floats at byte Offset of each of 8 blocks of Stride bytes at p
template <int Stride, int Offset>
FOMOE_INLINE F8 load_f16_of_blocks(const uint8_t* p) {
  if constexpr (Stride > 24) {
    return load_f16_apart(p + Offset, Stride);
  } else {
    constexpr auto word = [](int i) { return static_cast<short>((i * Stride + Offset) / 2); };
    constexpr short last = 4 * Stride - 32;  // the first word of the last 64 bytes
    const __m512i at = _mm512_castsi128_si512(
        _mm_setr_epi16(word(0), word(1), word(2), word(3), word(4), word(5), word(6), word(7)));
    __m512i all = _mm512_permutex2var_epi16(load_64(p).v, at, load_64(p + 64).v);
    if constexpr (word(7) >= 64) {
      static_assert(word(5) < 64 && word(6) >= last);
      const __mmask32 beyond = word(6) >= 64 ? 0xc0 : 0x80;
      all = _mm512_mask_permutexvar_epi16(
          all, beyond, _mm512_sub_epi16(at, _mm512_set1_epi16(last)), load_64(p + 2 * last).v);
    }
    return _mm256_cvtph_ps(_mm512_castsi512_si128(all));
  }
}
inline W16 wide_load(const float* p) { return _mm512_loadu_ps(p); }
inline W16 wide_splat(float x) { return _mm512_set1_ps(x); }

// What is left of a bias of the quants in the products.
template <int Bias>
constexpr int kBiasLeft = Bias;

// Lane j of quad i: the sum over quad i of q[j] times the quad's 16 values, q[j] having 4 quads.
FOMOE_INLINE __m512i quad_dots(const B64* q, const int8_t* x) {
  __m512i each[4];
  for (int i = 0; i < 4; ++i)
    each[i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q[i].v, load_64(x + 64 * i).v);
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(each[0], each[1]),
                                      _mm512_unpackhi_epi32(each[0], each[1]));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(each[2], each[3]),
                                      _mm512_unpackhi_epi32(each[2], each[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}
// Dots of the 8 groups of 32 of a chunk.
template <int Bias>
FOMOE_INLINE F8 dots_32(const B64* q, const int8_t* x) {
  const __m512i quads = quad_dots(q, x);
  const __m512i both = _mm512_add_epi32(quads, _mm512_shuffle_i64x2(quads, quads, 0xb1));
  const __m512i pick = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0);
  return to_float(_mm512_castsi512_si256(_mm512_permutexvar_epi32(pick, both)));
}
// Dots of the 16 groups of 16.
template <int Bias>
FOMOE_INLINE W16 dots_16(const B64* q, const int8_t* x) {
  const __m512i pick = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(pick, quad_dots(q, x)));
}

constexpr int kRows = 16;
constexpr int kFloatRows = 4;  // that share a pass over float32 activations
constexpr int kTileTokens = 8;
constexpr bool kBitsMatter = false;
using RowFloats = __m512;
using RowInts = __m512i;
using RowBytes = B64;  // a dword of each row

inline RowBytes row_bytes(int x) { return splat_64(x); }
inline void row_store(uint8_t* p, RowBytes a) { _mm512_store_si512(p, a.v); }
// Right by N bits, left where negative; bits of neighbouring bytes come in.
template <int N>
inline RowBytes row_shift(RowBytes a) {
  return {N < 0 ? _mm512_slli_epi16(a.v, -N) : _mm512_srli_epi16(a.v, N)};
}

inline RowFloats row_zero() { return _mm512_setzero_ps(); }
inline RowFloats row_load(const void* p) { return _mm512_load_ps(p); }
inline void row_store(float* p, RowFloats a) { _mm512_storeu_ps(p, a); }
inline RowFloats row_splat(const float* p) { return _mm512_set1_ps(*p); }
inline RowFloats row_float(RowInts a) { return _mm512_cvtepi32_ps(a); }
inline RowInts row_int_zero() { return _mm512_setzero_si512(); }
inline RowInts row_int_splat(const int32_t* p) { return _mm512_set1_epi32(*p); }

// 16 bytes of each row of a panel, `stride` apart, to 4 vectors of one dword per row.
FOMOE_INLINE void transpose_rows(const uint8_t* p, int64_t stride, RowBytes* out) {
  __m512i a[4];  // quad i of a[r]: row r + 4 i
  for (int r = 0; r < 4; ++r) {
    const auto quad = [&](int i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + (r + 4 * i) * stride));
    };
    a[r] = _mm512_mask_broadcast_i32x4(_mm512_castsi128_si512(quad(0)), 0x00f0, quad(1));
    a[r] = _mm512_mask_broadcast_i32x4(a[r], 0x0f00, quad(2));
    a[r] = _mm512_mask_broadcast_i32x4(a[r], 0xf000, quad(3));
  }
  const __m512i low01 = _mm512_unpacklo_epi32(a[0], a[1]),
                low23 = _mm512_unpacklo_epi32(a[2], a[3]);
  const __m512i top01 = _mm512_unpackhi_epi32(a[0], a[1]),
                top23 = _mm512_unpackhi_epi32(a[2], a[3]);
  out[0] = {_mm512_unpacklo_epi64(low01, low23)};
  out[1] = {_mm512_unpackhi_epi64(low01, low23)};
  out[2] = {_mm512_unpacklo_epi64(top01, top23)};
  out[3] = {_mm512_unpackhi_epi64(top01, top23)};
}

// dot[t] += dots of `Dwords` dwords of quants of each row at w with those of token t at x.
template <int Bits, int Dwords, int N>
FOMOE_INLINE void row_dots(const uint8_t* w, const int8_t* x, RowInts* dot) {
#pragma GCC unroll 8
  for (int d = 0; d < Dwords; ++d) {
    const __m512i q = _mm512_load_si512(w + 64 * d);
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t) {
      int32_t word;
      std::memcpy(&word, x + 4 * (Dwords * t + d), 4);
      dot[t] = _mm512_dpbusd_epi32(dot[t], q, _mm512_set1_epi32(word));
    }
  }
}

}  // namespace fomoe::cpu::FOMOE_ISA
