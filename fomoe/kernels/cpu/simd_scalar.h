// Portable vectors: the same lanes and the same operations as simd_avx2.h, so the same bits.
// Compilers turn these loops into NEON or SSE2 where they can.
#pragma once

#include <cmath>
#include <cstring>

#include "half.h"

#define FOMOE_UNROLL_GROUPS  // vectors live in memory here: nothing to gain

namespace fomoe::cpu::FOMOE_ISA {

struct F8 {
  float v[8];
};
struct I8 {
  int32_t v[8];
};
struct B32 {
  uint8_t v[32];
};

template <class V, class Lane>
inline V make(Lane lane) {
  V r;
  for (int i = 0; i < static_cast<int>(sizeof(r.v) / sizeof(r.v[0])); ++i) r.v[i] = lane(i);
  return r;
}
template <class Lane>
inline F8 floats(Lane lane) {
  return make<F8>(lane);
}
template <class Lane>
inline B32 byte_lanes(Lane lane) {
  return make<B32>([&](int i) { return static_cast<uint8_t>(lane(i)); });
}

inline F8 splat(float x) {
  return floats([&](int) { return x; });
}
inline F8 zero() { return splat(0.0f); }
inline F8 load(const void* p) {
  F8 r;
  std::memcpy(r.v, p, 32);
  return r;
}
inline void store(float* p, F8 a) { std::memcpy(p, a.v, 32); }
inline F8 load_n(const float* p, int n) {
  F8 r = zero();
  std::memcpy(r.v, p, 4 * size_t(n));
  return r;
}
inline void store_n(float* p, F8 a, int n) { std::memcpy(p, a.v, 4 * size_t(n)); }
// (a, a, a, a, b, b, b, b) of the floats a, b at p
inline F8 splat_pair(const float* p) {
  return floats([&](int i) { return p[i / 4]; });
}
// (a0, a0, a1, a1, a2, a2, a3, a3) and the same of a4 to a7
inline F8 low_twice(F8 a) {
  return floats([&](int i) { return a.v[i / 2]; });
}
inline F8 high_twice(F8 a) {
  return floats([&](int i) { return a.v[4 + i / 2]; });
}
// out[w] = element w of 8 rows of 4 floats at p
inline void transpose_8x4(const float* p, F8* out) {
  for (int w = 0; w < 4; ++w)
    for (int i = 0; i < 8; ++i) out[w].v[i] = p[4 * i + w];
}
inline F8 add(F8 a, F8 b) {
  return floats([&](int i) { return a.v[i] + b.v[i]; });
}
inline F8 sub(F8 a, F8 b) {
  return floats([&](int i) { return a.v[i] - b.v[i]; });
}
inline F8 mul(F8 a, F8 b) {
  return floats([&](int i) { return a.v[i] * b.v[i]; });
}
inline F8 div(F8 a, F8 b) {
  return floats([&](int i) { return a.v[i] / b.v[i]; });
}
inline F8 fma(F8 a, F8 b, F8 c) {
  return floats([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
// The second operand where one is NaN, as x86 does.
inline F8 max(F8 a, F8 b) {
  return floats([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F8 min(F8 a, F8 b) {
  return floats([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F8 abs(F8 a) {
  return floats([&](int i) { return __builtin_fabsf(a.v[i]); });
}
inline F8 round_even(F8 a) {
  return floats([&](int i) { return __builtin_nearbyintf(a.v[i]); });
}
inline I8 to_int(F8 a) {
  return make<I8>([&](int i) { return static_cast<int32_t>(a.v[i]); });
}
inline F8 to_float(I8 a) {
  return floats([&](int i) { return static_cast<float>(a.v[i]); });
}
// a * 2^n for lanes whose result is a normal number
inline F8 scale_by_power(F8 a, I8 n) {
  F8 r;
  for (int i = 0; i < 8; ++i) {
    uint32_t bits = static_cast<uint32_t>(n.v[i] + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    r.v[i] = a.v[i] * power;
  }
  return r;
}
inline float first(F8 a) { return a.v[0]; }

inline float sum(F8 a) {
  const float x = (a.v[0] + a.v[4]) + (a.v[2] + a.v[6]);
  const float y = (a.v[1] + a.v[5]) + (a.v[3] + a.v[7]);
  return x + y;
}
inline float max_lane(F8 a) {
  float m = a.v[0];
  for (int i = 1; i < 8; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}

// 8 half or brain floats at any byte address
inline F8 load_f16(const void* p) {
  uint16_t h[8];
  std::memcpy(h, p, 16);
  return floats([&](int i) { return float_from_half(h[i]); });
}
inline F8 load_bf16(const void* p) {
  uint16_t b[8];
  std::memcpy(b, p, 16);
  return floats([&](int i) { return float_from_bfloat(b[i]); });
}
inline void store_f16(uint16_t* p, F8 a) {
  for (int i = 0; i < 8; ++i) p[i] = half_from_float(a.v[i]);
}
inline float half_scalar(uint16_t h) { return float_from_half(h); }
// 8 half floats, `stride` bytes apart
inline F8 load_f16_apart(const uint8_t* p, int stride) {
  return floats([&](int i) {
    uint16_t h;
    std::memcpy(&h, p + i * stride, 2);
    return float_from_half(h);
  });
}

// 32 bytes; shifts are of each byte, without the bits of its neighbour only after and_().
inline B32 bytes(const void* p) {
  B32 r;
  std::memcpy(r.v, p, 32);
  return r;
}
inline void store_bytes(void* p, B32 a) { std::memcpy(p, a.v, 32); }
inline B32 splat_byte(int x) {
  return byte_lanes([&](int) { return x; });
}
inline B32 and_(B32 a, B32 b) {
  return byte_lanes([&](int i) { return a.v[i] & b.v[i]; });
}
inline B32 or_(B32 a, B32 b) {
  return byte_lanes([&](int i) { return a.v[i] | b.v[i]; });
}
inline B32 subtract(B32 a, B32 b) {
  return byte_lanes([&](int i) { return a.v[i] - b.v[i]; });
}
template <int N>
inline B32 shift_right(B32 a) {
  return byte_lanes([&](int i) { return a.v[i] >> N; });
}
template <int N>
inline B32 shift_left(B32 a) {
  return byte_lanes([&](int i) { return a.v[i] << N; });
}
// 16 bytes -> their low nibbles, then their high nibbles
inline B32 nibbles(const uint8_t* p) {
  return byte_lanes([&](int i) { return i < 16 ? p[i] & 15 : p[i - 16] >> 4; });
}
// byte i = value where bit i of the 4 bytes at p is set, else 0
inline B32 spread_bits(const uint8_t* p, int value) {
  return byte_lanes([&](int i) { return (p[i / 8] >> (i % 8)) & 1 ? value : 0; });
}
inline B32 flip_top_bit(B32 a) {
  return byte_lanes([&](int i) { return a.v[i] ^ 128; });
}
inline B32 look_up(B32 index, const uint8_t* table) {
  return byte_lanes([&](int i) { return table[index.v[i] & 15]; });
}

// the 8 int8 of a little-endian word as floats
inline F8 from_int8(uint64_t word) {
  return floats([&](int i) { return static_cast<float>(static_cast<int8_t>(word >> (8 * i))); });
}
// 8 lanes, each an integer in [-127, 127], to 8 int8 at p
inline void store_int8(int8_t* p, F8 a) {
  for (int i = 0; i < 8; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}

}  // namespace fomoe::cpu::FOMOE_ISA
