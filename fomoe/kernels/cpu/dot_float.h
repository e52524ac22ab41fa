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
    store_quants<T>(chunk, chunk_);
    store_numbers<T>(chunk, chunk_);
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

// The four sums of an output: lane j of sum i takes the values 32 g + 8 i + j.
struct FourSums {
  F8 of[4] = {zero(), zero(), zero(), zero()};
  float total() const { return sum(add(add(of[0], of[1]), add(of[2], of[3]))); }
};

// One token against a row that is unpacked on the way.
template <class Row>
inline float dot_alone(Row& w, const float* x, int64_t cols) {
  FourSums sums;
  for (int64_t begin = 0; begin < cols; begin += kChunk, x += kChunk) {
    w.open(begin / kChunk);
    const int n = chunk_size(cols, begin);
    for (int g = 0; g < n / 32; ++g) {
      F8 value[4];
      w.group(g, value);
      for (int i = 0; i < 4; ++i) sums.of[i] = fma(value[i], load(x + 32 * g + 8 * i), sums.of[i]);
    }
    for (int v = n / 32 * 4; 8 * v < n; ++v) {
      const int lanes = n - 8 * v < 8 ? n - 8 * v : 8;
      sums.of[v % 4] = fma(w.part(v, lanes), load_n(x + 8 * v, lanes), sums.of[v % 4]);
    }
  }
  return sums.total();
}

// R rows in float32, `cols` apart, against N tokens: the sums of all stay in registers.
template <int R, int N>
inline void dot_tile(const Slice& s, const float* w, const float* x, int64_t cols, int64_t row,
                     int64_t j) {
  const float* at[N];
  for (int t = 0; t < N; ++t) at[t] = x + token_of(s, j + t) * cols;
  W16 acc[R][N][2];
  for (auto& of_row : acc)
    for (auto& of_token : of_row) of_token[0] = of_token[1] = wide_splat(0.0f);
  const int64_t whole = cols / 32 * 32;
  for (int64_t k = 0; k < whole; k += 32)
    for (int half = 0; half < 2; ++half) {
      W16 value[R];
      for (int r = 0; r < R; ++r) value[r] = wide_load(w + r * cols + k + 16 * half);
      for (int t = 0; t < N; ++t) {
        const W16 activation = wide_load(at[t] + k + 16 * half);
        for (int r = 0; r < R; ++r) acc[r][t][half] = fma(value[r], activation, acc[r][t][half]);
      }
    }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < N; ++t) {
      FourSums sums{{low_half(acc[r][t][0]), high_half(acc[r][t][0]), low_half(acc[r][t][1]),
                     high_half(acc[r][t][1])}};
      for (int64_t k = whole; k < cols; k += 8) {
        const int lanes = cols - k < 8 ? static_cast<int>(cols - k) : 8;
        F8& sum = sums.of[(k - whole) / 8];
        sum = fma(load_n(w + r * cols + k, lanes), load_n(at[t] + k, lanes), sum);
      }
      s.out[(j + t) * s.out_stride + row + r] = sums.total();
    }
}

template <int R>
inline void dot_tiles(const Slice& s, const float* w, const float* x, int64_t cols, int64_t row) {
  int64_t j = 0;
  for (; j + 3 <= s.count; j += 3) dot_tile<R, 3>(s, w, x, cols, row, j);
  if (s.count - j == 2) dot_tile<R, 2>(s, w, x, cols, row, j);
  if (s.count - j == 1) dot_tile<R, 1>(s, w, x, cols, row, j);
}

template <class Row>
void dot_f32(const Slice& s, const float* x, int64_t cols, void* scratch) {
  if (s.count == 1) {
    const float* const token = x + token_of(s, 0) * cols;
    for (int64_t row = s.begin; row < s.end; ++row) {
      Row alone(s.weights + row * s.row_bytes, cols);
      s.out[row] = dot_alone(alone, token, cols);
    }
    return;
  }
  float* const values = static_cast<float*>(scratch);
  for (int64_t row = s.begin; row < s.end; row += kFloatRows) {
    const int64_t rows = s.end - row < kFloatRows ? s.end - row : kFloatRows;
    for (int64_t r = 0; r < rows; ++r)
      dequantize<Row>(s.weights + (row + r) * s.row_bytes, cols, values + r * cols);
    if (rows == kFloatRows) {
      dot_tiles<kFloatRows>(s, values, x, cols, row);
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) dot_tiles<1>(s, values + r * cols, x, cols, row + r);
  }
}

}  // namespace fomoe::cpu::FOMOE_ISA
