// Vectors of 16 floats for tiles of sums, and sums of many vectors at once.
#pragma once

#include "wide.h"

namespace fomoe::cpu::FOMOE_ISA {

// Whether a W16 is one of 32 registers rather than two of 16: how large tiles may be.
#if !defined(FOMOE_SCALAR) && defined(__AVX512F__)
constexpr bool kWideRegisters = true;
// the 8 floats at p in both halves
inline W16 load_both(const float* p) {
  return _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(load(p))));
}
#else
constexpr bool kWideRegisters = false;
inline W16 load_both(const float* p) { return join(load(p), load(p)); }
#endif

// The same names for vectors of 8 and of 16.
template <int Lanes>
struct Vector;
template <>
struct Vector<8> {
  using type = F8;
  static F8 load(const float* p) { return FOMOE_ISA::load(p); }
  static F8 splat(float x) { return FOMOE_ISA::splat(x); }
};
template <>
struct Vector<16> {
  using type = W16;
  static W16 load(const float* p) { return wide_load(p); }
  static W16 splat(float x) { return wide_splat(x); }
};

// Lane i: sum() of the 8 floats at p + 8 i.
#if !defined(FOMOE_SCALAR) && defined(__AVX2__)
FOMOE_INLINE F8 sums_of_rows(const float* p) {
  F8 four[4];  // rows i and i + 4: lanes j and j + 4 added
  for (int i = 0; i < 4; ++i) {
    const auto both = [&](int at) __attribute__((always_inline)) {
      return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 8 * i + at)),
                                  _mm_loadu_ps(p + 8 * i + 32 + at), 1);
    };
    four[i] = add(both(0), both(4));
  }
  F8 two[2];
  for (int i = 0; i < 2; ++i) {
    const __m256d a = _mm256_castps_pd(four[2 * i]), b = _mm256_castps_pd(four[2 * i + 1]);
    two[i] = add(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                 _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return add(_mm256_shuffle_ps(two[0], two[1], _MM_SHUFFLE(2, 0, 2, 0)),
             _mm256_shuffle_ps(two[0], two[1], _MM_SHUFFLE(3, 1, 3, 1)));
}
#else
inline F8 sums_of_rows(const float* p) {
  return floats([&](int i) { return sum(load(p + 8 * i)); });
}
#endif

}  // namespace fomoe::cpu::FOMOE_ISA
