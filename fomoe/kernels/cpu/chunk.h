// Chunks of weights and of activations where they lie, rows that end inside a chunk included.
#pragma once

#include "table.h"
#include "unpack.h"

namespace fomoe::cpu::FOMOE_ISA {

// Weights come from memory once per token: asking for them a page ahead of the hardware's own guess
// took 10 experts on one core from 7 to 10 GB/s, which is all that core could read.
inline void fetch_ahead(const uint8_t* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + 4096 + i);
}

// The last chunk of a row, filled up with zeros: scales and offsets are 0 there.
template <class T>
inline void unpack_rest(const uint8_t* at, int64_t values, typename T::C& c) {
  uint8_t padded[T::chunk_bytes] = {};
  std::memcpy(padded, at, static_cast<size_t>(values * T::chunk_bytes / kChunk));
  T::unpack(padded, c);
}

template <class T>
inline void unpack_at(const uint8_t* row, int64_t cols, int64_t chunk, typename T::C& c) {
  const uint8_t* const at = row + chunk * T::chunk_bytes;
  const int64_t left = cols - chunk * kChunk;
  if (left >= kChunk)
    T::unpack(at, c);
  else
    unpack_rest<T>(at, left, c);
}

// A chunk in memory.
struct Stored {
  alignas(64) uint8_t q[kChunk];
  alignas(64) float scale[16];
  alignas(64) float offset[16];
};

template <class T>
inline void store_chunk(const typename T::C& c, Stored& out) {
  for (int i = 0; i < 4; ++i) store_64(out.q + 64 * i, c.q[i]);
  store(out.scale, c.scale);
  if constexpr (T::shape.has_offset) store(out.offset, c.offset);
}

template <int Group>
inline Lanes<Group> load_lanes(const float* p) {
  if constexpr (Group == 32) return load(p);
  else return wide_load(p);
}
template <int Group>
inline Lanes<Group> splat_lanes(float x) {
  if constexpr (Group == 32) return splat(x);
  else return wide_splat(x);
}
// The scale per 32 values of activations, for each group.
template <int Group>
inline Lanes<Group> activation_scale(const float* p) {
  if constexpr (Group == 32) return load(p);
  else return twice_each(load(p));
}
// Dots of each group as float32, which holds them exactly.
template <int Group, int Bias>
inline Lanes<Group> group_dots(const B64* q, const int8_t* x) {
  if constexpr (Group == 32) return dots_32<Bias>(q, x);
  else return dots_16<Bias>(q, x);
}

// Sums of the int8 of each group of a chunk.
template <int Group>
inline Lanes<Group> chunk_sums(const int8_t* x) {
  const B64 ones[4] = {splat_64(1), splat_64(1), splat_64(1), splat_64(1)};
  return group_dots<Group, 0>(ones, x);
}

// 256 activations with their scales, filled up with zeros.
struct PaddedChunk {
  alignas(64) int8_t q[kChunk];
  alignas(32) float scale[8];
};
inline void pad_chunk(const int8_t* q, const float* scale, int64_t values, PaddedChunk& out) {
  out = {};
  std::memcpy(out.q, q, static_cast<size_t>(values));
  std::memcpy(out.scale, scale, static_cast<size_t>(values / 32) * sizeof(float));
}

// sum(q) per group, times the scale where the weight type has offsets.
template <int Group>
inline void sums_of(const int8_t* q, const float* scale, int64_t n, bool scaled, float* sums) {
  constexpr int per_chunk = kChunk / Group;
  for (int64_t i = 0; i < n; i += kChunk, sums += per_chunk) {
    const int64_t left = n - i;
    PaddedChunk padded;
    const bool whole = left >= kChunk;
    if (!whole) pad_chunk(q + i, scale + i / 32, left, padded);
    auto s = chunk_sums<Group>(whole ? q + i : padded.q);
    if (scaled) s = mul(s, activation_scale<Group>(whole ? scale + i / 32 : padded.scale));
    if (whole) {
      store(sums, s);
      continue;
    }
    float rest[per_chunk];
    store(rest, s);
    std::memcpy(sums, rest, static_cast<size_t>(left / Group) * sizeof(float));
  }
}
inline void group_sums(const int8_t* q, const float* scale, int64_t n, QuantShape shape,
                       float* sums) {
  if (shape.group == 32) return sums_of<32>(q, scale, n, shape.has_offset, sums);
  sums_of<16>(q, scale, n, shape.has_offset, sums);
}

inline int64_t token_of(const Slice& s, int64_t j) { return s.tokens ? s.tokens[j] : j; }

}  // namespace fomoe::cpu::FOMOE_ISA
