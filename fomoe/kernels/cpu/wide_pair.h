// Wide vectors as two vectors of simd.h.
#pragma once

#include "simd.h"

namespace fomoe::cpu::FOMOE_ISA {

struct B64 {
  B32 half[2];
};
struct W16 {
  F8 half[2];
};

inline B64 join(B32 a, B32 b) { return {{a, b}}; }
inline B64 load_64(const void* p) {
  return {{bytes(p), bytes(static_cast<const uint8_t*>(p) + 32)}};
}
// 32 bytes in both halves
inline B64 load_twice(const void* p) { return join(bytes(p), bytes(p)); }
inline B64 splat_64(int x) { return join(splat_byte(x), splat_byte(x)); }
inline B64 and_(B64 a, B64 b) {
  return join(and_(a.half[0], b.half[0]), and_(a.half[1], b.half[1]));
}
inline B64 or_(B64 a, B64 b) { return join(or_(a.half[0], b.half[0]), or_(a.half[1], b.half[1])); }
inline B64 subtract(B64 a, B64 b) {
  return join(subtract(a.half[0], b.half[0]), subtract(a.half[1], b.half[1]));
}
inline B64 flip_top_bit(B64 a) { return join(flip_top_bit(a.half[0]), flip_top_bit(a.half[1])); }
template <int N>
inline B32 shift(B32 a) {
  if constexpr (N > 0) return shift_right<N>(a);
  if constexpr (N < 0) return shift_left<-N>(a);
  return a;
}
// The halves shifted right by A and B bits (left where negative); callers mask away what comes in
// from neighbouring bytes.
template <int A, int B>
inline B64 shift_halves(B64 a) {
  return join(shift<A>(a.half[0]), shift<B>(a.half[1]));
}
// 16 bytes at a and at b: low nibbles, then high nibbles, of each
inline B64 nibbles(const uint8_t* a, const uint8_t* b) { return join(nibbles(a), nibbles(b)); }
inline B64 spread_bits(const uint8_t* a, const uint8_t* b, int value) {
  return join(spread_bits(a, value), spread_bits(b, value));
}
inline B64 look_up(B64 index, const uint8_t* table) {
  return join(look_up(index.half[0], table), look_up(index.half[1], table));
}
inline void store_64(uint8_t* p, B64 a) {
  store_bytes(p, a.half[0]);
  store_bytes(p + 32, a.half[1]);
}

inline W16 join(F8 a, F8 b) { return {{a, b}}; }
inline void store(float* p, W16 a) {
  store(p, a.half[0]);
  store(p + 8, a.half[1]);
}
inline W16 sub(W16 a, W16 b) { return join(sub(a.half[0], b.half[0]), sub(a.half[1], b.half[1])); }
inline W16 mul(W16 a, W16 b) { return join(mul(a.half[0], b.half[0]), mul(a.half[1], b.half[1])); }
inline W16 fma(W16 a, W16 b, W16 c) {
  return join(fma(a.half[0], b.half[0], c.half[0]), fma(a.half[1], b.half[1], c.half[1]));
}
inline F8 low_half(W16 a) { return a.half[0]; }
inline F8 high_half(W16 a) { return a.half[1]; }
// the 16 int8 of two little-endian words as floats
inline W16 from_int8(uint64_t low, uint64_t high) { return join(from_int8(low), from_int8(high)); }
// (a0, a0, a1, a1, ...)
inline W16 twice_each(F8 a) { return join(low_twice(a), high_twice(a)); }
// The half floats at byte Offset of each of 8 blocks of Stride bytes at p
template <int Stride, int Offset>
inline F8 load_f16_of_blocks(const uint8_t* p) {
  return load_f16_apart(p + Offset, Stride);
}
inline W16 wide_load(const float* p) { return join(load(p), load(p + 8)); }
inline W16 wide_splat(float x) { return join(splat(x), splat(x)); }

// Dots of the 8 groups of 32 of a chunk.
template <int Bias>
FOMOE_INLINE F8 dots_32(const B64* q, const int8_t* x) {
  I8 each[8];
  for (int g = 0; g < 8; ++g) each[g] = product<Bias>(q[g / 2].half[g % 2], bytes(x + 32 * g));
  return to_float(sums_of_8(each));
}
// Dots of the 16 groups of 16.
template <int Bias>
FOMOE_INLINE W16 dots_16(const B64* q, const int8_t* x) {
  I8 each[8];
  for (int g = 0; g < 8; ++g) each[g] = product<Bias>(q[g / 2].half[g % 2], bytes(x + 32 * g));
  return join(to_float(half_sums_of_4(each)), to_float(half_sums_of_4(each + 4)));
}

}  // namespace fomoe::cpu::FOMOE_ISA
