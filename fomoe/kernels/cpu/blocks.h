// Block formats of GGUF weights, as defined by ggml's `ggml-common.h` and `ggml-quants.c`
// (https://github.com/ggml-org/ggml). A row of a matrix is a sequence of blocks of 32 or 256
// consecutive values. `d`, `m` and `dmin` are IEEE half floats kept as their 16 bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fomoe::cpu {

// Numbers of ggml's `enum ggml_type`.
enum class QType : int {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q2_K = 10,
  Q3_K = 11,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  IQ4_NL = 20,
  IQ4_XS = 23,
  BF16 = 30,
};
constexpr int kTypeCount = 31;

using half_bits = uint16_t;

#pragma pack(push, 1)  // alignment 1: blocks start at any byte

// value[i] = d * q[i], q int8
struct BlockQ8_0 {
  half_bits d;
  int8_t q[32];
};
static_assert(sizeof(BlockQ8_0) == 34);

// value[i] = d * (q - 8); low nibble of q[i] is value i, high nibble is value i + 16
struct BlockQ4_0 {
  half_bits d;
  uint8_t q[16];
};
static_assert(sizeof(BlockQ4_0) == 18);

// value[i] = d * q + m; nibbles as Q4_0
struct BlockQ4_1 {
  half_bits d, m;
  uint8_t q[16];
};
static_assert(sizeof(BlockQ4_1) == 20);

// value[i] = d * (q - 16); nibbles as Q4_0, bit i of `high` (little endian) is the fifth bit of q
struct BlockQ5_0 {
  half_bits d;
  uint8_t high[4];
  uint8_t q[16];
};
static_assert(sizeof(BlockQ5_0) == 22);

// value[i] = d * q + m; bits as Q5_0
struct BlockQ5_1 {
  half_bits d, m;
  uint8_t high[4];
  uint8_t q[16];
};
static_assert(sizeof(BlockQ5_1) == 24);

// value = d * (scale & 15) * q - dmin * (scale >> 4), q of 2 bits, one scale byte per 16 values.
// Group 4 h + c of 32 values lies in bits 2c, 2c + 1 of the bytes q[32 h .. 32 h + 31].
struct BlockQ2_K {
  uint8_t scale[16];
  uint8_t q[64];
  half_bits d, dmin;
};
static_assert(sizeof(BlockQ2_K) == 84);

// value = d * (scale - 32) * (q - 4 * !bit), q of 2 bits as in Q2_K, one 6-bit scale per 16 values.
// The bit of group g, value i is bit g of high[i]. Scale s: low nibble from nibble s / 8 of byte
// s % 8, top two bits from bits 2 (s / 4) of byte 8 + s % 4.
struct BlockQ3_K {
  uint8_t high[32];
  uint8_t q[64];
  uint8_t scale[12];
  half_bits d;
};
static_assert(sizeof(BlockQ3_K) == 110);

// value = d * scale * q - dmin * min, scale and min of 6 bits per 32 values.
// Groups 2 j and 2 j + 1 are the low and high nibbles of q[32 j .. 32 j + 31].
// scale[0..3] and scale[4..7] hold scales and mins 0..3 in their low 6 bits; those of groups 4..7
// have their low nibbles in scale[8..11] (scale low, min high) and their top bits in bits 6, 7.
struct BlockQ4_K {
  half_bits d, dmin;
  uint8_t scale[12];
  uint8_t q[128];
};
static_assert(sizeof(BlockQ4_K) == 144);

// As Q4_K; bit g of high[i] is the fifth bit of value i of group g.
struct BlockQ5_K {
  half_bits d, dmin;
  uint8_t scale[12];
  uint8_t high[32];
  uint8_t q[128];
};
static_assert(sizeof(BlockQ5_K) == 176);

// value = d * scale * (q - 32), q of 6 bits, one int8 scale per 16 values. Half h holds groups 4h
// to 4h + 3 of 32 values: low nibbles of low[64 h ..] (two groups), then its high nibbles; the top
// two bits of group c of the half are bits 2c, 2c + 1 of high[32 h ..].
struct BlockQ6_K {
  uint8_t low[128];
  uint8_t high[64];
  int8_t scale[16];
  half_bits d;
};
static_assert(sizeof(BlockQ6_K) == 210);

// value = d * table[q], nibbles as Q4_0, table of 16 levels (kIq4Levels - 128)
struct BlockIQ4_NL {
  half_bits d;
  uint8_t q[16];
};
static_assert(sizeof(BlockIQ4_NL) == 18);

// value = d * (scale - 32) * table[q], one 6-bit scale per 32 values: low nibble g of scale_low,
// bits 2 g of scale_high. Each group's 16 bytes have their nibbles as Q4_0.
struct BlockIQ4_XS {
  half_bits d;
  uint16_t scale_high;
  uint8_t scale_low[4];
  uint8_t q[128];
};
static_assert(sizeof(BlockIQ4_XS) == 136);

#pragma pack(pop)

// The non-linear 4-bit levels of IQ4_NL and IQ4_XS (ggml-common.h, kvalues_iq4nl), plus 128.
constexpr uint8_t kIq4Levels[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                    129, 141, 153, 166, 181, 197, 217, 241};

struct TypeShape {
  int elements = 0;  // values per block; 0: the type number is not supported
  int bytes = 0;
};

constexpr TypeShape type_shape(int type) {
  switch (static_cast<QType>(type)) {
    case QType::F32:
      return {1, 4};
    case QType::F16:
      return {1, 2};
    case QType::BF16:
      return {1, 2};
    case QType::Q8_0:
      return {32, sizeof(BlockQ8_0)};
    case QType::Q4_0:
      return {32, sizeof(BlockQ4_0)};
    case QType::Q4_1:
      return {32, sizeof(BlockQ4_1)};
    case QType::Q5_0:
      return {32, sizeof(BlockQ5_0)};
    case QType::Q5_1:
      return {32, sizeof(BlockQ5_1)};
    case QType::Q2_K:
      return {256, sizeof(BlockQ2_K)};
    case QType::Q3_K:
      return {256, sizeof(BlockQ3_K)};
    case QType::Q4_K:
      return {256, sizeof(BlockQ4_K)};
    case QType::Q5_K:
      return {256, sizeof(BlockQ5_K)};
    case QType::Q6_K:
      return {256, sizeof(BlockQ6_K)};
    case QType::IQ4_NL:
      return {32, sizeof(BlockIQ4_NL)};
    case QType::IQ4_XS:
      return {256, sizeof(BlockIQ4_XS)};
  }
  return {};
}

// How the integer kernels see a type: one scale per `group` values; value = scale * (q - bias), or
// scale * q + offset, with q unsigned of `bits` bits. A group of 0 stands for float types.
struct QuantShape {
  int group = 0, bits = 0, bias = 0;
  bool has_offset = false;
};

constexpr QuantShape quant_shape(int type) {
  switch (static_cast<QType>(type)) {
    case QType::Q8_0:
    case QType::IQ4_NL:
    case QType::IQ4_XS:
      return {32, 8, 128, false};
    case QType::Q4_0:
      return {32, 4, 8, false};
    case QType::Q5_0:
      return {32, 5, 16, false};
    case QType::Q4_1:
    case QType::Q4_K:
      return {32, 4, 0, true};
    case QType::Q5_1:
    case QType::Q5_K:
      return {32, 5, 0, true};
    case QType::Q2_K:
      return {16, 2, 0, true};
    case QType::Q3_K:
      return {16, 3, 4, false};
    case QType::Q6_K:
      return {16, 6, 32, false};
    default:
      return {};
  }
}

constexpr bool is_float_type(int type) { return type_shape(type).elements == 1; }

}  // namespace fomoe::cpu
