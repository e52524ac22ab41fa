// Q4_K and Q5_K for a few tokens on AVX-512.
//
// Four vectors of 32 packed bytes V0..V3 hold the groups 2 j (low nibbles) and 2 j + 1.
// Interleaving their 64-bit words before the nibbles are split lets the products of a group's first
// and second half add up without further shuffles: 9 shuffles per chunk and token become 5, and the
// 4 of the unpacking are shared by all tokens.
#pragma once

#include "chunk.h"

namespace fomoe::cpu::FOMOE_ISA {

// Order of the groups in lanes.
inline __m256i paired_groups() { return _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); }

// Words of 64 bits of activations: vector v takes nibble v / 2 and words v % 2, v % 2 + 2 of a
// group.
inline void arrange_pairs(RowChunk& chunk) {
  alignas(64) uint64_t from[32], to[32];
  std::memcpy(from, chunk.q, sizeof(from));
  for (int v = 0; v < 4; ++v)
    for (int w = 0; w < 8; ++w) {
      const int group = w / 4 * 2 + w % 2 * 4 + v / 2;
      to[8 * v + w] = from[4 * group + w / 2 % 2 * 2 + v % 2];
    }
  std::memcpy(chunk.q, to, sizeof(to));
  store(chunk.scale, _mm256_permutexvar_ps(paired_groups(), load(chunk.scale)));
  // Scales of mins stay positive, so their factors take the sign.
  const F8 sums = _mm256_permutexvar_ps(paired_groups(), load(chunk.sums));
  store(chunk.sums, sub(zero(), sums));
}

struct PairedRows {
  static FOMOE_INLINE F8 dots(const B64* q, const int8_t* x) {
    const auto both = [&](int i) __attribute__((always_inline)) {
      const __m512i first =
          _mm512_dpbusd_epi32(_mm512_setzero_si512(), q[i].v, load_64(x + 64 * i).v);
      return _mm512_castsi512_ps(
          _mm512_dpbusd_epi32(first, q[i + 1].v, load_64(x + 64 * i + 64).v));
    };
    const __m512 low = both(0), high = both(2);
    const __m512i sums = _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(low, high, 0x88)),
                                          _mm512_castps_si512(_mm512_shuffle_ps(low, high, 0xdd)));
    const __m256i a = _mm512_castsi512_si256(sums), b = _mm512_extracti64x4_epi64(sums, 1);
    return to_float(_mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                                     _mm256_permute2x128_si256(a, b, 0x31)));
  }
  static F8 natural(F8 partials) {
    return _mm256_permutexvar_ps(_mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7), partials);
  }
  static void arrange(RowChunk& chunk) { arrange_pairs(chunk); }

  // Nibbles at the lower end of their bytes; the other bits are not cleared.
  static FOMOE_INLINE void split_nibbles(const uint8_t* packed, B64* q) {
    const __m512i first = load_64(packed).v;
    __m512i second = load_64(packed + 64).v;
    asm("" : "+v"(second));  // as an operand in memory it would cross a cache line twice
    const B64 even{_mm512_unpacklo_epi64(first, second)};
    const B64 odd{_mm512_unpackhi_epi64(first, second)};
    q[0] = even;
    q[1] = odd;
    q[2] = shift_halves<4, 4>(even);
    q[3] = shift_halves<4, 4>(odd);
  }

  // Scales and mins as in scale_4k; `header` are the first 16 bytes of a block: d, dmin, scale[12].
  static FOMOE_INLINE void unpack_scales(const uint8_t* header, F8* scale, F8* offset) {
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(header));
    // Words of 64 bits: scale[0..3], scale[8..11]; scale[4..7], scale[8..11].
    const __m128i words = _mm_shuffle_epi8(
        all, _mm_setr_epi8(4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15));
    // Byte i of a word begins at the given bit: the low 6 bits of groups 0, 4, 1, 5, 2, 6, 3, 7 (of
    // groups from 4 on: low 4), then their top 2 bits, moved to bits 4 and 5.
    const __m128i low_at =
        _mm_setr_epi8(0, 32, 8, 40, 16, 48, 24, 56, 0, 36, 8, 44, 16, 52, 24, 60);
    const __m128i top_at = _mm_setr_epi8(0, 2, 0, 10, 0, 18, 0, 26, 0, 2, 0, 10, 0, 18, 0, 26);
    const __m128i low =
        _mm_and_si128(_mm_multishift_epi64_epi8(low_at, words), _mm_set1_epi16(0x0f3f));
    const __m128i top =
        _mm_and_si128(_mm_multishift_epi64_epi8(top_at, words), _mm_set1_epi16(0x3000));
    const __m512 six = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_or_si128(low, top)));
    const __m128 d = _mm_cvtph_ps(all);
    const __m512i pick = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512 product =
        _mm512_mul_ps(_mm512_permutexvar_ps(pick, _mm512_castps128_ps512(d)), six);
    *scale = low_half(product);
    *offset = high_half(product);
  }
};

template <>
struct RowForm<Q4_K> : PairedRows {
  static FOMOE_INLINE void unpack(const uint8_t* p, Q4_K::C& c) {
    split_nibbles(p + offsetof(BlockQ4_K, q), c.q);
    for (B64& q : c.q) q = and_(q, splat_64(15));
    unpack_scales(p, &c.scale, &c.offset);
  }
};

template <>
struct RowForm<Q5_K> : PairedRows {
  static FOMOE_INLINE void unpack(const uint8_t* p, Q5_K::C& c) {
    const __m512i high = load_twice(p + offsetof(BlockQ5_K, high)).v;
    const __m512i even = _mm512_unpacklo_epi64(high, high);
    const __m512i odd = _mm512_unpackhi_epi64(high, high);
    // Bit g of a byte moves to bit 4, the others vanish: row 4 of a matrix has bit g set.
    const auto bit = [](int g) { return int64_t{1} << (24 + g); };
    const __m512i low =
        _mm512_setr_epi64(bit(0), bit(4), bit(0), bit(4), bit(2), bit(6), bit(2), bit(6));
    const __m512i top = _mm512_slli_epi64(low, 1);
    const __m512i fifth[4] = {
        _mm512_gf2p8affine_epi64_epi8(even, low, 0), _mm512_gf2p8affine_epi64_epi8(odd, low, 0),
        _mm512_gf2p8affine_epi64_epi8(even, top, 0), _mm512_gf2p8affine_epi64_epi8(odd, top, 0)};
    B64 nibbles[4];
    split_nibbles(p + offsetof(BlockQ5_K, q), nibbles);
    for (int i = 0; i < 4; ++i)  // nibble & 15 | fifth
      c.q[i].v = _mm512_ternarylogic_epi64(nibbles[i].v, splat_64(15).v, fifth[i], 0xea);
    unpack_scales(p, &c.scale, &c.offset);
  }
};

}  // namespace fomoe::cpu::FOMOE_ISA
