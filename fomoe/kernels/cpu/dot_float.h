// Products with float32 activations, for every weight type, and dequantisation.
//
// One order for each output: groups of 32 values in turn; lane j of sum i takes the values
// 32 g + 8 i + j; the four sums are added, then their lanes by one tree.
#pragma once

#include "chunk.h"

namespace fomoe::cpu::FOMOE_ISA {

// Rows as float32: open(i) makes ready the values from kChunk * i on, group(g) yields 32 of them.
template <class T>
class BlockRow {
 public:
  BlockRow(const uint8_t* row, int64_t cols) : row_(row), cols_(cols) {}
  FOMOE_INLINE void open(int64_t i) {
    typename T::C chunk;
    fetch_ahead<T>(row_ + i * T::chunk_bytes);
    unpack_at<T>(row_, cols_, i, chunk);
    for (B64& q : chunk.q) q = subtract(q, splat_64(T::shape.bias));
    store_chunk<T>(chunk, chunk_);
  }
  void group(int g, F8* out) const {
    constexpr int per_32 = 32 / T::group;
    for (int i = 0; i < 4; ++i) {
      const int at = per_32 * g + i * per_32 / 4;
      out[i] = mul(splat(chunk_.scale[at]), from_int8(word64(chunk_.q + 32 * g + 8 * i)));
      if constexpr (T::shape.has_offset) out[i] = add(out[i], splat(chunk_.offset[at]));
    }
  }
  F8 part(int, int) const { return zero(); }  // blocks end at multiples of 32

 private:
  const uint8_t* row_;
  int64_t cols_;
  Stored chunk_;
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
  void open(int64_t i) { at_ = row_ + i * kChunk * T::size; }
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
