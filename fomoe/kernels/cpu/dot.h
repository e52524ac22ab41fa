// Products of weight rows with activations, for every weight type.
//
// One order for each output: chunks of 256 values in turn, groups of 32 within a chunk in turn,
// even and odd groups apart, eight float lanes side by side (lane j takes values 4 j .. 4 j + 3 of
// each group of the integer kernel), one tree over the lanes at the end. Tokens are taken several
// at a time only to unpack a row once.
#pragma once

#include "table.h"
#include "unpack.h"

namespace fomoe::cpu::FOMOE_ISA {

constexpr int kTokens = 4;  // tokens that share a pass over an unpacked row

// The scale of group g of 32 in the lanes of its products; `scales` has one per 16 or 32 values.
template <class T>
inline F8 group_scale(const float* scales, int g) {
  if constexpr (T::group == 32) return splat(scales[g]);
  return splat_pair(scales + 2 * g);
}

// scale * (activation scale of the group of 32) for a whole chunk, as the loop over groups would
// multiply them one by one.
template <class T>
inline void scale_chunk(const Chunk& c, F8 activation, float* out) {
  if constexpr (T::group == 32) {
    store(out, mul(load(c.scale), activation));
  } else {
    store(out, mul(load(c.scale), low_twice(activation)));
    store(out + 8, mul(load(c.scale + 8), high_twice(activation)));
  }
}

template <class T>
inline I8 product(B32 w, B32 x) {
  if constexpr (T::is_signed) return dot_signed(w, x);
  return dot_unsigned(w, x);
}

// Running sums of N tokens for one row.
template <class T, int N>
struct Accumulator {
  F8 products[N][2];  // of the even and the odd groups of 32
  F8 offsets[N];      // used where the type has offsets

  Accumulator() {
    for (int t = 0; t < N; ++t) products[t][0] = products[t][1] = offsets[t] = zero();
  }

  // `first` is the number of the chunk's first group of 32 in the row.
  inline __attribute__((always_inline)) void take(const Chunk& c, int groups, int64_t first,
                                                  const QuantizedRows& x, const int64_t* token) {
    alignas(32) float both[N == 1 ? 16 : 1];
    if constexpr (N == 1) {
      const float* const at = x.scale + token[0] * x.scale_stride + first;
      scale_chunk<T>(c, groups == kGroups ? load(at) : load_n(at, groups), both);
    }
    FOMOE_UNROLL_GROUPS
    for (int g = 0; g < groups; ++g)
      for (int t = 0; t < N; ++t) {
        const B32 q = bytes(x.q + token[t] * x.cols + 32 * (first + g));
        const F8 dots = to_float(product<T>(c.q[g], q));
        F8 scale;
        if constexpr (N == 1)
          scale = group_scale<T>(both, g);
        else
          scale = mul(group_scale<T>(c.scale, g),
                      splat(x.scale[token[t] * x.scale_stride + first + g]));
        products[t][g % 2] = fma(dots, scale, products[t][g % 2]);
      }
    if constexpr (T::has_offset) {
      constexpr int vectors = 32 / T::group;  // of 8 offsets in a chunk
      for (int t = 0; t < N; ++t)
        for (int i = 0; i < vectors; ++i) {
          const float* sums = x.sums + token[t] * x.sums_stride + vectors * first + 8 * i;
          offsets[t] = fma(load(c.offset + 8 * i), load(sums), offsets[t]);
        }
    }
  }

  float total(int t) const {
    const F8 both = add(products[t][0], products[t][1]);
    if constexpr (T::has_offset) return sum(add(both, offsets[t]));
    return sum(both);
  }
};

// Weights come from memory once per token: asking for them a page ahead of the hardware's own guess
// took 10 experts on one core from 7 to 10 GB/s, which is all that core could read.
inline void fetch_ahead(const uint8_t* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + 4096 + i);
}

template <class T>
inline void unpack_at(const uint8_t* row, int64_t chunk, int groups, Chunk& c) {
  if constexpr (T::has_offset && T::elements == 32)
    if (groups < kGroups) store(c.offset, zero());
  constexpr int chunk_bytes = kChunk / T::elements * T::block_bytes;
  const uint8_t* const at = row + chunk * chunk_bytes;
  fetch_ahead(at, chunk_bytes);
  T::unpack(at, groups, c);
}

inline int64_t token_of(const Slice& s, int64_t j) { return s.tokens ? s.tokens[j] : j; }

// Tokens [j, j + N) of the slice against one row, chunk by chunk from `source(i, groups)`.
template <class T, int N, class Source>
inline __attribute__((always_inline)) void dot_tokens(const Slice& s, const QuantizedRows& x,
                                                      int64_t row, int64_t j, Source source) {
  int64_t token[N];
  for (int t = 0; t < N; ++t) token[t] = token_of(s, j + t);
  Accumulator<T, N> acc;
  const int64_t whole = x.cols / kChunk;
  const int rest = static_cast<int>(x.cols % kChunk) / 32;
  for (int64_t i = 0; i < whole; ++i) acc.take(source(i, kGroups), kGroups, 8 * i, x, token);
  if (rest) acc.take(source(whole, rest), rest, 8 * whole, x, token);
  for (int t = 0; t < N; ++t) s.out[(j + t) * s.out_stride + row] = acc.total(t);
}

template <class T>
void dot_q8(const Slice& s, const QuantizedRows& x, void* scratch) {
  Chunk* unpacked = static_cast<Chunk*>(scratch);
  for (int64_t row = s.begin; row < s.end; ++row) {
    const uint8_t* w = s.weights + row * s.row_bytes;
    if (s.count == 1) {
      Chunk c;
      dot_tokens<T, 1>(s, x, row, 0, [&](int64_t i, int groups) -> const Chunk& {
        unpack_at<T>(w, i, groups, c);
        return c;
      });
      continue;
    }
    const int64_t whole = x.cols / kChunk;
    for (int64_t i = 0; i < whole; ++i) unpack_at<T>(w, i, kGroups, unpacked[i]);
    const int rest = static_cast<int>(x.cols % kChunk) / 32;
    if (rest) unpack_at<T>(w, whole, rest, unpacked[whole]);
    const auto stored = [&](int64_t i, int) -> const Chunk& { return unpacked[i]; };
    int64_t j = 0;
    for (; j + kTokens <= s.count; j += kTokens) dot_tokens<T, kTokens>(s, x, row, j, stored);
    for (; j < s.count; ++j) dot_tokens<T, 1>(s, x, row, j, stored);
  }
}

// The 32 values of group g of an unpacked chunk in float32.
template <class T>
inline void values(const Chunk& c, int g, F8* out) {
  constexpr int scales = 32 / T::group;
  alignas(32) uint8_t q[32];
  store_bytes(q, c.q[g]);
  for (int i = 0; i < 4; ++i) {
    const int at = scales * g + i * scales / 4;
    out[i] = mul(splat(c.scale[at]), from_int8(word64(q + 8 * i)));
    if constexpr (T::has_offset) out[i] = add(out[i], splat(c.offset[at]));
  }
}

// Rows as float32: open(i) makes ready the values from kChunk * i on, group(g) yields 32 of them.
template <class T>
class BlockRow {
 public:
  BlockRow(const uint8_t* row, int64_t cols) : row_(row), cols_(cols) {}
  inline __attribute__((always_inline)) void open(int64_t i) {
    const int64_t left = cols_ - i * kChunk;
    unpack_at<T>(row_, i, left < kChunk ? static_cast<int>(left / 32) : kGroups, chunk_);
  }
  void group(int g, F8* out) const { values<T>(chunk_, g, out); }
  F8 part(int, int) const { return zero(); }  // blocks end at multiples of 32

 private:
  const uint8_t* row_;
  int64_t cols_;
  Chunk chunk_;
};

// The float types: 8 values at p.
struct F32 {
  static F8 eight(const uint8_t* p) { return load(p); }
  static constexpr int size = 4;
};
struct F16 {
  static F8 eight(const uint8_t* p) { return load_f16(p); }
  static constexpr int size = 2;
};
struct BF16 {
  static F8 eight(const uint8_t* p) { return load_bf16(p); }
  static constexpr int size = 2;
};

template <class T>
class FloatRow {
 public:
  FloatRow(const uint8_t* row, int64_t) : row_(row), at_(row) {}
  void open(int64_t i) {
    at_ = row_ + i * kChunk * T::size;
    fetch_ahead(at_, kChunk * T::size);
  }
  void group(int g, F8* out) const {
    for (int i = 0; i < 4; ++i) out[i] = T::eight(at_ + (32 * g + 8 * i) * T::size);
  }
  // values 8 v .. 8 v + n - 1, then zeros
  F8 part(int v, int n) const {
    uint8_t tail[32] = {};
    std::memcpy(tail, at_ + 8 * v * T::size, static_cast<size_t>(n) * T::size);
    return T::eight(tail);
  }

 private:
  const uint8_t *row_, *at_;
};

inline int chunk_size(int64_t cols, int64_t begin) {
  return static_cast<int>(cols - begin < kChunk ? cols - begin : kChunk);
}

template <class Row>
void dequantize(const uint8_t* data, int64_t cols, float* out) {
  Row row(data, cols);
  for (int64_t begin = 0; begin < cols; begin += kChunk, out += kChunk) {
    row.open(begin / kChunk);
    const int n = chunk_size(cols, begin);
    for (int g = 0; g < n / 32; ++g) {
      F8 value[4];
      row.group(g, value);
      for (int i = 0; i < 4; ++i) store(out + 32 * g + 8 * i, value[i]);
    }
    for (int v = n / 32 * 4; 8 * v < n; ++v) {
      const int lanes = n - 8 * v < 8 ? n - 8 * v : 8;
      store_n(out + 8 * v, row.part(v, lanes), lanes);
    }
  }
}

// N tokens against one row: lane j of sum i takes the values 32 g + 8 i + j.
template <int N, class Row>
inline void dot_floats(const Slice& s, Row& w, const float* x, int64_t cols, int64_t row,
                       int64_t j) {
  const float* at[N];
  F8 acc[N][4];
  for (int t = 0; t < N; ++t) {
    at[t] = x + token_of(s, j + t) * cols;
    for (F8& a : acc[t]) a = zero();
  }
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    w.open(begin / kChunk);
    const int n = chunk_size(cols, begin);
    for (int g = 0; g < n / 32; ++g) {
      F8 value[4];
      w.group(g, value);
      for (int i = 0; i < 4; ++i)
        for (int t = 0; t < N; ++t)
          acc[t][i] = fma(value[i], load(at[t] + begin + 32 * g + 8 * i), acc[t][i]);
    }
    for (int v = n / 32 * 4; 8 * v < n; ++v) {
      const int lanes = n - 8 * v < 8 ? n - 8 * v : 8;
      const F8 value = w.part(v, lanes);
      for (int t = 0; t < N; ++t)
        acc[t][v % 4] = fma(value, load_n(at[t] + begin + 8 * v, lanes), acc[t][v % 4]);
    }
  }
  for (int t = 0; t < N; ++t)
    s.out[(j + t) * s.out_stride + row] =
        sum(add(add(acc[t][0], acc[t][1]), add(acc[t][2], acc[t][3])));
}

template <class Row>
void dot_f32(const Slice& s, const float* x, int64_t cols, void* scratch) {
  float* const values = static_cast<float*>(scratch);
  FloatRow<F32> stored(static_cast<const uint8_t*>(scratch), cols);
  for (int64_t row = s.begin; row < s.end; ++row) {
    const uint8_t* const w = s.weights + row * s.row_bytes;
    if (s.count == 1) {
      Row alone(w, cols);
      dot_floats<1>(s, alone, x, cols, row, 0);
      continue;
    }
    dequantize<Row>(w, cols, values);
    int64_t j = 0;
    for (; j + 3 <= s.count; j += 3) dot_floats<3>(s, stored, x, cols, row, j);
    for (; j < s.count; ++j) dot_floats<1>(s, stored, x, cols, row, j);
  }
}

}  // namespace fomoe::cpu::FOMOE_ISA
