// Quantised weights times float activations: one value after the other, for tests and checks of
// what rounding activations to int8 costs. Slow on purpose of being plain.
#pragma once
#include "blocks.h"

// Value i of the block at `at`.
template <int kType>
FM_DEV float block_value(const char* base, int at, int i);

FM_DEV int byte_at(const char* base, int at) { return ((const unsigned char*)base)[at]; }

// Nibble i of 16 bytes: values 0 to 15 in the low ones, then 16 to 31 in the high ones.
FM_DEV int nibble_at(const char* base, int at, int i) {
  return byte_at(base, at + i % 16) >> i / 16 * 4 & 15;
}

template <>
FM_DEV float block_value<Q8_0>(const char* base, int at, int i) {
  return half_at(base, at) * (float)(signed char)byte_at(base, at + 2 + i);
}
template <>
FM_DEV float block_value<Q5_0>(const char* base, int at, int i) {
  const int fifth = byte_at(base, at + 2 + i / 8) >> i % 8 & 1;
  return half_at(base, at) * (float)((nibble_at(base, at + 6, i) | fifth << 4) - 16);
}

// d * scale * q - dmin * min with the scales of group i / 32.
FM_DEV float affine_value(const char* base, int at, int i, int q) {
  const int group = i / 32;
  const Affine a(*(const fm_u4*)(base + at), group / 2);
  return a.d * (float)a.scale(group % 2) * (float)q - a.min(group % 2);
}
template <>
FM_DEV float block_value<Q4_K>(const char* base, int at, int i) {
  const int q = byte_at(base, at + 16 + i / 64 * 32 + i % 32) >> i / 32 % 2 * 4 & 15;
  return affine_value(base, at, i, q);
}
template <>
FM_DEV float block_value<Q5_K>(const char* base, int at, int i) {
  const int q = byte_at(base, at + 48 + i / 64 * 32 + i % 32) >> i / 32 % 2 * 4 & 15;
  const int fifth = byte_at(base, at + 16 + i % 32) >> i / 32 & 1;
  return affine_value(base, at, i, q | fifth << 4);
}
template <>
FM_DEV float block_value<Q6_K>(const char* base, int at, int i) {
  const int half = i / 128, group = i / 32 % 4, place = i % 32;
  const int low = byte_at(base, at + 64 * half + group % 2 * 32 + place) >> group / 2 * 4 & 15;
  const int high = byte_at(base, at + 128 + 32 * half + place) >> 2 * group & 3;
  const float scale = half_at(base, at + 208) * (float)(signed char)byte_at(base, at + 192 + i / 16);
  return scale * (float)((low | high << 4) - 32);
}
template <>
FM_DEV float block_value<IQ4_XS>(const char* base, int at, int i) {
  const int group = i / 32, nibble = nibble_at(base, at + 8 + 16 * group, i % 32);
  const int low = byte_at(base, at + 4 + group / 2) >> group % 2 * 4 & 15;
  const int high = byte_at(base, at + 2 + group / 4) >> group % 4 * 2 & 3;
  const int level = (signed char)(Format<IQ4_XS>::kLevels[nibble / 4] >> nibble % 4 * 8);
  return half_at(base, at) * (float)((low | high << 4) - 32) * (float)level;
}

template <int kType>
struct PlainFormat : Contiguous<1> {
  static constexpr int kBlock = Format<kType>::kBlock, kBytes = Format<kType>::kBytes;
  static constexpr int kPiece = 32, kRuns = 1;
  static constexpr bool kInt8 = false;
  struct Acts { const float* x; };
  FM_DEV static int slot(int run, int) { return run; }
  FM_DEV static Acts load(const Input& x, int piece, int) {
    return {(const float*)x.runs + kPiece * piece};
  }
  FM_DEV static float dot(const char* base, int row, int piece, const Acts& x) {
    const int first = piece * kPiece, at = row + first / kBlock * kBytes;
    float sum = 0.0f;
    for (int i = 0; i < kPiece; ++i)
      sum = fm_fma(block_value<kType>(base, at, first % kBlock + i), x.x[i], sum);
    return sum;
  }
};
