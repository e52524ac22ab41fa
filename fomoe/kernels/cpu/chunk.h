// Chunks of weights and of activations where they lie, rows that end inside a chunk included.
#pragma once

#include "table.h"
#include "unpack.h"

namespace fomoe::cpu::FOMOE_ISA {

// Weights come from memory once per token. Where unpacking is much of the work the hardware's own
// guess comes late: asking for lines 8 KB ahead, into L2, took Q4_K from 0.80 to 0.88 of the
// bandwidth of a Zen 4 core. Where it is little (Q8_0) asking costs 0.15, and nearer requests or
// requests into L1 cost as much everywhere.
template <class T>
inline void fetch_ahead(const uint8_t* p) {
  if constexpr (T::chunk_bytes < 192)
    for (int i = 0; i < T::chunk_bytes; i += 64) __builtin_prefetch(p + 8192 + i, 0, 2);
}

// The blocks of the last `values` values of a row, filled up with zeros to a chunk: scales and
// offsets are 0 there.
template <class T>
inline void pad_blocks(const uint8_t* at, int64_t values, uint8_t* out) {
  std::memset(out, 0, T::chunk_bytes);
  std::memcpy(out, at, static_cast<size_t>(values * T::chunk_bytes / kChunk));
}

template <class T>
FOMOE_INLINE void unpack_at(const uint8_t* row, int64_t cols, int64_t chunk, typename T::C& c) {
  const uint8_t* const at = row + chunk * T::chunk_bytes;
  const int64_t left = cols - chunk * kChunk;
  if (T::elements == kChunk || left >= kChunk) return T::unpack(at, c);
  uint8_t padded[T::chunk_bytes];
  pad_blocks<T>(at, left, padded);
  T::unpack(padded, c);
}

// A chunk in memory.
struct Stored {
  alignas(64) uint8_t q[kChunk];
  alignas(64) float scale[16];
  alignas(64) float offset[16];
};

template <class T>
FOMOE_INLINE void store_quants(const typename T::C& c, Stored& out) {
  for (int i = 0; i < 4; ++i) store_64(out.q + 64 * i, c.q[i]);
}
template <class T>
FOMOE_INLINE void store_numbers(const typename T::C& c, Stored& out) {
  store(out.scale, c.scale);
  if constexpr (T::shape.has_offset) store(out.offset, c.offset);
}

template <int Group>
inline Lanes<Group> load_lanes(const float* p) {
  if constexpr (Group == 32)
    return load(p);
  else
    return wide_load(p);
}
template <int Group>
inline Lanes<Group> splat_lanes(float x) {
  if constexpr (Group == 32)
    return splat(x);
  else
    return wide_splat(x);
}
// Dots of each group as float32, which holds them exactly.
template <int Group, int Bias>
FOMOE_INLINE Lanes<Group> group_dots(const B64* q, const int8_t* x) {
  if constexpr (Group == 32)
    return dots_32<Bias>(q, x);
  else
    return dots_16<Bias>(q, x);
}

// Sums of the int8 of each group of a chunk.
template <int Group>
inline Lanes<Group> chunk_sums(const int8_t* x) {
  const B64 ones[4] = {splat_64(1), splat_64(1), splat_64(1), splat_64(1)};
  return group_dots<Group, 0>(ones, x);
}

// The scale per 32 values of activations, for each group.
template <int Group>
FOMOE_INLINE Lanes<Group> activation_scale(const float* p) {
  if constexpr (Group == 32)
    return load(p);
  else
    return twice_each(load(p));
}

// Chunk `c` of a token, filled up with zeros; scales and sums as in RowChunk, in natural order.
template <int Group>
inline void copy_chunk(const QuantizedRows& x, int64_t token, int64_t c, bool scaled,
                       RowChunk& out) {
  const int8_t* const q = x.q + token * x.cols + c * kChunk;
  const float* const scale = x.scale + token * (x.cols / 32) + c * (kChunk / 32);
  const int64_t left = x.cols - c * kChunk;
  alignas(32) float padded[8] = {};
  if (left >= kChunk) {
    std::memcpy(out.q, q, kChunk);
  } else {
    std::memset(out.q, 0, kChunk);
    std::memcpy(out.q, q, static_cast<size_t>(left));
    std::memcpy(padded, scale, static_cast<size_t>(left / 32) * sizeof(float));
  }
  const auto each = activation_scale<Group>(left >= kChunk ? scale : padded);
  const auto sums = chunk_sums<Group>(out.q);
  store(out.scale, each);
  store(out.sums, scaled ? mul(sums, each) : sums);
}

inline int64_t token_of(const Slice& s, int64_t j) { return s.tokens ? s.tokens[j] : j; }

}  // namespace fomoe::cpu::FOMOE_ISA
