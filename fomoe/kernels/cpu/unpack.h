// How each weight type unpacks: 256 consecutive values become unsigned quants and float scales,
// value = scale * (q - bias) or scale * q + offset (QuantShape). A new type is one struct here.
//
// Products of scales are rounded to float32 one by one, as ggml dequantises.
#pragma once

#include "blocks.h"
#include "wide.h"

namespace fomoe::cpu::FOMOE_ISA {

constexpr int kChunk = 256;  // values that are unpacked together

template <int Group>
struct LanesOf;
template <>
struct LanesOf<32> {
  using type = F8;
};
template <>
struct LanesOf<16> {
  using type = W16;
};
// One number per group of a chunk.
template <int Group>
using Lanes = typename LanesOf<Group>::type;

// `offset` is left untouched by types without offsets.
template <int Group>
struct Chunk {
  B64 q[4];
  Lanes<Group> scale, offset;
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

template <QType Q, class B>
struct Blocks {
  static constexpr QuantShape shape = quant_shape(static_cast<int>(Q));
  static constexpr int group = shape.group, elements = type_shape(static_cast<int>(Q)).elements;
  static constexpr int chunk_bytes = kChunk / elements * sizeof(B);
  using C = Chunk<shape.group>;
};

// Types with blocks of 32 values: `T::two` unpacks the quants of two blocks.
template <class T, QType Q, class B>
struct SmallBlocks : Blocks<Q, B> {
  using typename Blocks<Q, B>::C;
  static FOMOE_INLINE void unpack(const uint8_t* p, C& c) {
    const B* const b = reinterpret_cast<const B*>(p);
    for (int i = 0; i < 4; ++i) c.q[i] = T::two(b[2 * i], b[2 * i + 1]);
    c.scale = load_f16_of_blocks<sizeof(B), 0>(p);
    if constexpr (Blocks<Q, B>::shape.has_offset) c.offset = load_f16_of_blocks<sizeof(B), 2>(p);
  }
};

struct Q8_0 : SmallBlocks<Q8_0, QType::Q8_0, BlockQ8_0> {
  static FOMOE_INLINE B64 two(const BlockQ8_0& a, const BlockQ8_0& b) {
    return flip_top_bit(join(bytes(a.q), bytes(b.q)));
  }
};

struct Q4_0 : SmallBlocks<Q4_0, QType::Q4_0, BlockQ4_0> {
  static FOMOE_INLINE B64 two(const BlockQ4_0& a, const BlockQ4_0& b) { return nibbles(a.q, b.q); }
};

struct Q4_1 : SmallBlocks<Q4_1, QType::Q4_1, BlockQ4_1> {
  static FOMOE_INLINE B64 two(const BlockQ4_1& a, const BlockQ4_1& b) { return nibbles(a.q, b.q); }
};

struct Q5_0 : SmallBlocks<Q5_0, QType::Q5_0, BlockQ5_0> {
  static FOMOE_INLINE B64 two(const BlockQ5_0& a, const BlockQ5_0& b) {
    return or_(nibbles(a.q, b.q), spread_bits(a.high, b.high, 16));
  }
};

struct Q5_1 : SmallBlocks<Q5_1, QType::Q5_1, BlockQ5_1> {
  static FOMOE_INLINE B64 two(const BlockQ5_1& a, const BlockQ5_1& b) {
    return or_(nibbles(a.q, b.q), spread_bits(a.high, b.high, 16));
  }
};

struct IQ4_NL : SmallBlocks<IQ4_NL, QType::IQ4_NL, BlockIQ4_NL> {
  static FOMOE_INLINE B64 two(const BlockIQ4_NL& a, const BlockIQ4_NL& b) {
    return look_up(nibbles(a.q, b.q), kIq4Levels);
  }
};

// The 128 fields of 2 bits in 32 bytes (Q2_K, Q3_K, the top bits of Q6_K): bits 0, 1 of all bytes,
// then bits 2, 3, ...; each field at bits 0, 1 of its byte of out.
FOMOE_INLINE void two_bit_fields(const uint8_t* p, B64* out) {
  const B64 all = load_twice(p), mask = splat_64(3);
  out[0] = and_(shift_halves<0, 2>(all), mask);
  out[1] = and_(shift_halves<4, 6>(all), mask);
}

struct Q2_K : Blocks<QType::Q2_K, BlockQ2_K> {
  static FOMOE_INLINE void unpack(const uint8_t* p, C& c) {
    const auto& b = *reinterpret_cast<const BlockQ2_K*>(p);
    for (int h = 0; h < 2; ++h) two_bit_fields(b.q + 32 * h, c.q + 2 * h);
    const uint64_t low = word64(b.scale), high = word64(b.scale + 8), nibble = every_byte(15);
    c.scale = mul(wide_splat(half_scalar(b.d)), from_int8(low & nibble, high & nibble));
    c.offset =
        mul(wide_splat(-half_scalar(b.dmin)), from_int8(low >> 4 & nibble, high >> 4 & nibble));
  }
};

struct Q3_K : Blocks<QType::Q3_K, BlockQ3_K> {
  static FOMOE_INLINE void unpack(const uint8_t* p, C& c) {
    const auto& b = *reinterpret_cast<const BlockQ3_K*>(p);
    for (int h = 0; h < 2; ++h) two_bit_fields(b.q + 32 * h, c.q + 2 * h);
    const B64 high = load_twice(b.high), four = splat_64(4);
    const B64 bits[4] = {shift_halves<-2, -1>(high), shift_halves<0, 1>(high),
                         shift_halves<2, 3>(high), shift_halves<4, 5>(high)};
    for (int i = 0; i < 4; ++i) c.q[i] = or_(c.q[i], and_(bits[i], four));
    const uint64_t low = word64(b.scale), top = word32(b.scale + 8);
    const uint64_t pairs = top | (top >> 2) << 32;  // scales 0..3 and 4..7 in their low bits
    const auto six = [&](int s) {
      return (low >> s & every_byte(15)) | (pairs >> s & every_byte(3)) << 4;
    };
    c.scale = mul(wide_splat(half_scalar(b.d)), sub(from_int8(six(0), six(4)), wide_splat(32.0f)));
  }
};

// The 6-bit scales and mins of Q4_K and Q5_K.
template <class B>
FOMOE_INLINE void scale_4k(const B& b, Chunk<32>& c) {
  const uint32_t s = word32(b.scale), m = word32(b.scale + 4), high = word32(b.scale + 8);
  const uint32_t low6 = 0x3f3f3f3f, low4 = 0x0f0f0f0f, top2 = 0x30303030;
  const uint64_t s4 = (high & low4) | (s >> 2 & top2), m4 = (high >> 4 & low4) | (m >> 2 & top2);
  c.scale = mul(splat(half_scalar(b.d)), from_int8((s & low6) | s4 << 32));
  c.offset = mul(splat(-half_scalar(b.dmin)), from_int8((m & low6) | m4 << 32));
}

struct Q4_K : Blocks<QType::Q4_K, BlockQ4_K> {
  static FOMOE_INLINE void unpack(const uint8_t* p, C& c) {
    const auto& b = *reinterpret_cast<const BlockQ4_K*>(p);
    for (int j = 0; j < 4; ++j)
      c.q[j] = and_(shift_halves<0, 4>(load_twice(b.q + 32 * j)), splat_64(15));
    scale_4k(b, c);
  }
};

struct Q5_K : Blocks<QType::Q5_K, BlockQ5_K> {
  static FOMOE_INLINE void unpack(const uint8_t* p, C& c) {
    const auto& b = *reinterpret_cast<const BlockQ5_K*>(p);
    const B64 high = load_twice(b.high), fifth = splat_64(16);
    const B64 bits[4] = {shift_halves<-4, -3>(high), shift_halves<-2, -1>(high),
                         shift_halves<0, 1>(high), shift_halves<2, 3>(high)};
    for (int j = 0; j < 4; ++j) {
      const B64 low = and_(shift_halves<0, 4>(load_twice(b.q + 32 * j)), splat_64(15));
      c.q[j] = or_(low, and_(bits[j], fifth));
    }
    scale_4k(b, c);
  }
};

struct Q6_K : Blocks<QType::Q6_K, BlockQ6_K> {
  static FOMOE_INLINE void unpack(const uint8_t* p, C& c) {
    const auto& b = *reinterpret_cast<const BlockQ6_K*>(p);
    const B64 mask = splat_64(15), top = splat_64(48);
    for (int h = 0; h < 2; ++h) {
      const B64 low = load_64(b.low + 64 * h), high = load_twice(b.high + 32 * h);
      c.q[2 * h] = or_(and_(low, mask), and_(shift_halves<-4, -2>(high), top));
      c.q[2 * h + 1] =
          or_(and_(shift_halves<4, 4>(low), mask), and_(shift_halves<0, 2>(high), top));
    }
    c.scale = mul(wide_splat(half_scalar(b.d)), from_int8(word64(b.scale), word64(b.scale + 8)));
  }
};

// Byte i of a word moved to byte 2 i.
constexpr uint64_t spread_bytes(uint64_t x) {
  x = (x | x << 16) & 0x0000ffff0000ffff;
  return (x | x << 8) & 0x00ff00ff00ff00ff;
}
// Bits 2 i, 2 i + 1 moved to byte i.
constexpr uint64_t spread_two_bits(uint64_t x) {
  x = (x | x << 24) & 0x000000ff000000ff;
  x = (x | x << 12) & 0x000f000f000f000f;
  return (x | x << 6) & every_byte(3);
}

struct IQ4_XS : Blocks<QType::IQ4_XS, BlockIQ4_XS> {
  static FOMOE_INLINE void unpack(const uint8_t* p, C& c) {
    const auto& b = *reinterpret_cast<const BlockIQ4_XS*>(p);
    for (int i = 0; i < 4; ++i)
      c.q[i] = look_up(nibbles(b.q + 32 * i, b.q + 32 * i + 16), kIq4Levels);
    const uint64_t low = word32(b.scale_low), nibble = 0x0f0f0f0f;
    const uint64_t six = spread_bytes(low & nibble) | spread_bytes(low >> 4 & nibble) << 8 |
                         spread_two_bits(b.scale_high) << 4;
    c.scale = mul(splat(half_scalar(b.d)), sub(from_int8(six), splat(32.0f)));
  }
};

}  // namespace fomoe::cpu::FOMOE_ISA
