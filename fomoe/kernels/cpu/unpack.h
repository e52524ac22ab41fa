// How each weight type unpacks: up to 256 consecutive values become int8 quants and float scales,
// value = scale * q (+ offset), with one scale per `group` values. A new type is one struct here.
//
// Where a type has no offset `offset` stays untouched; q is unsigned (0..63) where `is_signed` is
// false. Products of scales are rounded to float32 one by one, as ggml dequantises.
#pragma once

#include "blocks.h"
#include "simd.h"

namespace fomoe::cpu::FOMOE_ISA {

constexpr int kChunk = 256;  // values that are unpacked together
constexpr int kGroups = 8;   // groups of 32 in a chunk

struct Chunk {
  B32 q[kGroups];
  alignas(32) float scale[16];
  alignas(32) float offset[16];
};

inline uint32_t word32(const void* p) {
  uint32_t w;
  std::memcpy(&w, p, 4);
  return w;
}
inline uint64_t word64(const void* p) {
  uint64_t w;
  std::memcpy(&w, p, 8);
  return w;
}
constexpr uint64_t every_byte(uint64_t b) { return b * 0x0101010101010101; }

// Types with blocks of 32 values: `T::one` unpacks a block into element g of a chunk.
template <class T, class B>
struct SmallBlocks {
  static constexpr int elements = 32, group = 32, block_bytes = sizeof(B);
  static void unpack(const uint8_t* p, int groups, Chunk& c) {
    for (int g = 0; g < groups; ++g) T::one(reinterpret_cast<const B*>(p)[g], g, c);
  }
};
template <class B, int Group>
struct BigBlocks {
  static constexpr int elements = 256, group = Group, block_bytes = sizeof(B);
};

struct Q8_0 : SmallBlocks<Q8_0, BlockQ8_0> {
  static constexpr bool is_signed = true, has_offset = false;
  static void one(const BlockQ8_0& b, int g, Chunk& c) {
    c.q[g] = bytes(b.q);
    c.scale[g] = half_scalar(b.d);
  }
};

struct Q4_0 : SmallBlocks<Q4_0, BlockQ4_0> {
  static constexpr bool is_signed = true, has_offset = false;
  static void one(const BlockQ4_0& b, int g, Chunk& c) {
    c.q[g] = subtract(nibbles(b.q), splat_byte(8));
    c.scale[g] = half_scalar(b.d);
  }
};

struct Q4_1 : SmallBlocks<Q4_1, BlockQ4_1> {
  static constexpr bool is_signed = false, has_offset = true;
  static void one(const BlockQ4_1& b, int g, Chunk& c) {
    c.q[g] = nibbles(b.q);
    c.scale[g] = half_scalar(b.d);
    c.offset[g] = half_scalar(b.m);
  }
};

struct Q5_0 : SmallBlocks<Q5_0, BlockQ5_0> {
  static constexpr bool is_signed = true, has_offset = false;
  static void one(const BlockQ5_0& b, int g, Chunk& c) {
    c.q[g] = subtract(or_(nibbles(b.q), spread_bits(b.high, 16)), splat_byte(16));
    c.scale[g] = half_scalar(b.d);
  }
};

struct Q5_1 : SmallBlocks<Q5_1, BlockQ5_1> {
  static constexpr bool is_signed = false, has_offset = true;
  static void one(const BlockQ5_1& b, int g, Chunk& c) {
    c.q[g] = or_(nibbles(b.q), spread_bits(b.high, 16));
    c.scale[g] = half_scalar(b.d);
    c.offset[g] = half_scalar(b.m);
  }
};

struct IQ4_NL : SmallBlocks<IQ4_NL, BlockIQ4_NL> {
  static constexpr bool is_signed = true, has_offset = false;
  static void one(const BlockIQ4_NL& b, int g, Chunk& c) {
    c.q[g] = look_up(nibbles(b.q), kIq4Values);
    c.scale[g] = half_scalar(b.d);
  }
};

// The groups 4 h .. 4 h + 3 of 2-bit fields in 32 bytes (Q2_K, Q3_K, the top bits of Q6_K), each
// field moved to bit `To` of its byte.
template <int To>
inline void two_bit_fields(const uint8_t* p, B32* out) {
  const B32 all = bytes(p), mask = splat_byte(3 << To);
  if constexpr (To == 0) {
    out[0] = and_(all, mask);
    out[1] = and_(shift_right<2>(all), mask);
    out[2] = and_(shift_right<4>(all), mask);
    out[3] = and_(shift_right<6>(all), mask);
  } else {
    static_assert(To == 4);
    out[0] = and_(shift_left<4>(all), mask);
    out[1] = and_(shift_left<2>(all), mask);
    out[2] = and_(all, mask);
    out[3] = and_(shift_right<2>(all), mask);
  }
}

struct Q2_K : BigBlocks<BlockQ2_K, 16> {
  static constexpr bool is_signed = false, has_offset = true;
  static void unpack(const uint8_t* p, int, Chunk& c) {
    const auto& b = *reinterpret_cast<const BlockQ2_K*>(p);
    for (int h = 0; h < 2; ++h) two_bit_fields<0>(b.q + 32 * h, c.q + 4 * h);
    const F8 d = splat(half_scalar(b.d)), dmin = splat(-half_scalar(b.dmin));
    for (int i = 0; i < 16; i += 8) {
      const uint64_t both = word64(b.scale + i);
      store(c.scale + i, mul(d, from_int8(both & every_byte(15))));
      store(c.offset + i, mul(dmin, from_int8(both >> 4 & every_byte(15))));
    }
  }
};

struct Q3_K : BigBlocks<BlockQ3_K, 16> {
  static constexpr bool is_signed = true, has_offset = false;
  static void unpack(const uint8_t* p, int, Chunk& c) {
    const auto& b = *reinterpret_cast<const BlockQ3_K*>(p);
    for (int h = 0; h < 2; ++h) two_bit_fields<0>(b.q + 32 * h, c.q + 4 * h);
    add_high_bits(bytes(b.high), c.q);
    const uint64_t low = word64(b.scale), top = word32(b.scale + 8);
    const uint64_t pairs = top | (top >> 2) << 32;  // scales 0..3 and 4..7 in their low bits
    const F8 d = splat(half_scalar(b.d)), bias = splat(32.0f);
    for (int i = 0; i < 2; ++i) {
      const uint64_t six = (low >> (4 * i) & every_byte(15)) | (pairs >> (4 * i) & every_byte(3))
                                                                   << 4;
      store(c.scale + 8 * i, mul(d, sub(from_int8(six), bias)));
    }
  }

 private:
  // q of 2 bits -> q - 4 where the group's bit is clear
  static void add_high_bits(B32 high, B32* q) {
    const B32 four = splat_byte(4);
    const B32 bits[kGroups] = {shift_left<2>(high),  shift_left<1>(high),  high,
                               shift_right<1>(high), shift_right<2>(high), shift_right<3>(high),
                               shift_right<4>(high), shift_right<5>(high)};
    for (int g = 0; g < kGroups; ++g) q[g] = subtract(or_(q[g], and_(bits[g], four)), four);
  }
};

// The 6-bit scales and mins of Q4_K and Q5_K as two words of 8 bytes.
struct ScalesAndMins {
  uint64_t scales, mins;
};
inline ScalesAndMins scales_and_mins(const uint8_t* p) {
  const uint32_t s = word32(p), m = word32(p + 4), high = word32(p + 8);
  const uint32_t low6 = 0x3f3f3f3f, low4 = 0x0f0f0f0f, top2 = 0x30303030;
  const uint32_t s4 = (high & low4) | (s >> 2 & top2), m4 = (high >> 4 & low4) | (m >> 2 & top2);
  return {(s & low6) | static_cast<uint64_t>(s4) << 32, (m & low6) | static_cast<uint64_t>(m4)
                                                                         << 32};
}

template <class B>
inline void scale_4k(const B& b, Chunk& c) {
  const ScalesAndMins six = scales_and_mins(b.scale);
  store(c.scale, mul(splat(half_scalar(b.d)), from_int8(six.scales)));
  store(c.offset, mul(splat(-half_scalar(b.dmin)), from_int8(six.mins)));
}

struct Q4_K : BigBlocks<BlockQ4_K, 32> {
  static constexpr bool is_signed = false, has_offset = true;
  static void unpack(const uint8_t* p, int, Chunk& c) {
    const auto& b = *reinterpret_cast<const BlockQ4_K*>(p);
    const B32 mask = splat_byte(15);
    for (int j = 0; j < 4; ++j) {
      const B32 both = bytes(b.q + 32 * j);
      c.q[2 * j] = and_(both, mask);
      c.q[2 * j + 1] = and_(shift_right<4>(both), mask);
    }
    scale_4k(b, c);
  }
};

struct Q5_K : BigBlocks<BlockQ5_K, 32> {
  static constexpr bool is_signed = false, has_offset = true;
  static void unpack(const uint8_t* p, int, Chunk& c) {
    const auto& b = *reinterpret_cast<const BlockQ5_K*>(p);
    const B32 mask = splat_byte(15), fifth = splat_byte(16), high = bytes(b.high);
    const B32 bits[kGroups] = {
        shift_left<4>(high),  shift_left<3>(high),  shift_left<2>(high), shift_left<1>(high), high,
        shift_right<1>(high), shift_right<2>(high), shift_right<3>(high)};
    for (int j = 0; j < 4; ++j) {
      const B32 both = bytes(b.q + 32 * j);
      c.q[2 * j] = or_(and_(both, mask), and_(bits[2 * j], fifth));
      c.q[2 * j + 1] = or_(and_(shift_right<4>(both), mask), and_(bits[2 * j + 1], fifth));
    }
    scale_4k(b, c);
  }
};

struct Q6_K : BigBlocks<BlockQ6_K, 16> {
  static constexpr bool is_signed = true, has_offset = false;
  static void unpack(const uint8_t* p, int, Chunk& c) {
    const auto& b = *reinterpret_cast<const BlockQ6_K*>(p);
    const B32 mask = splat_byte(15), bias = splat_byte(32);
    for (int h = 0; h < 2; ++h) {
      const B32 first = bytes(b.low + 64 * h), second = bytes(b.low + 64 * h + 32);
      const B32 low[4] = {first, second, shift_right<4>(first), shift_right<4>(second)};
      B32 top[4];
      two_bit_fields<4>(b.high + 32 * h, top);
      for (int i = 0; i < 4; ++i) c.q[4 * h + i] = subtract(or_(and_(low[i], mask), top[i]), bias);
    }
    const F8 d = splat(half_scalar(b.d));
    for (int i = 0; i < 16; i += 8) store(c.scale + i, mul(d, from_int8(word64(b.scale + i))));
  }
};

struct IQ4_XS : BigBlocks<BlockIQ4_XS, 32> {
  static constexpr bool is_signed = true, has_offset = false;
  static void unpack(const uint8_t* p, int, Chunk& c) {
    const auto& b = *reinterpret_cast<const BlockIQ4_XS*>(p);
    const float d = half_scalar(b.d);
    for (int g = 0; g < kGroups; ++g) {
      c.q[g] = look_up(nibbles(b.q + 16 * g), kIq4Values);
      const int low = b.scale_low[g / 2] >> (4 * (g % 2)) & 15;
      const int six = low | (b.scale_high >> (2 * g) & 3) << 4;
      c.scale[g] = d * static_cast<float>(six - 32);
    }
  }
};

}  // namespace fomoe::cpu::FOMOE_ISA
