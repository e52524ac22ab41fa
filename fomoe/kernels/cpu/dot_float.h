// Products with float32 activations, for every weight type, and dequantisation.
//
// One order for each output: groups of 32 values in turn; lane j of sum i takes the values
// 32 g + 8 i + j; the four sums are added, then their lanes by one tree.
#pragma once

#include "chunk.h"
#include "floats16.h"

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

// Values [begin, end) of a row, begin at a chunk's.
template <class Row>
inline void unpack_floats(Row& row, int64_t begin, int64_t end, float* out) {
  for (; begin < end; begin += kChunk, out += kChunk) {
    row.open(begin / kChunk);
    const int n = chunk_size(end, begin);
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

template <class Row>
void dequantize(const uint8_t* data, int64_t cols, float* out) {
  Row row(data, cols);
  unpack_floats(row, 0, cols, out);
}

// Rows against two tokens or more, in tiles of rows and tokens whose sums stay in registers. A few
// rows are unpacked for some depth, into L1, and the tokens of a block go by, from L2; between
// depths the four sums of every pair of row and token lie in memory.
template <class Row>
class FloatTiles {
 public:
  FloatTiles(const Slice& s, const float* x, int64_t cols, float* scratch)
      : s_(s), x_(x), cols_(cols), rows_(scratch), sums_(scratch + kRows * kDepth) {}

  void run() const {
    const int64_t fitting = kTokenBytes / (4 * cols_) / kTokens * kTokens;
    const int64_t block = fitting < kLeast ? kLeast : fitting > kMost ? kMost : fitting;
    for (int64_t j = 0; j < s_.count; j += block) {
      const int64_t end = s_.count - j < block ? s_.count : j + block;
      int64_t row = s_.begin;
      for (; row + kRows <= s_.end; row += kRows) multiply<kRows>(row, j, end);
      for (; row + 2 <= s_.end; row += 2) multiply<2>(row, j, end);
      if (row < s_.end) multiply<1>(row, j, end);
    }
  }

 private:
  // Sums 0 and 1, then 2 and 3, in one vector per pair: the tile fills the registers.
  static constexpr int kRows = kWideRegisters ? 4 : 3, kTokens = kWideRegisters ? 4 : 2;
  static constexpr int64_t kDepth = 2 * kChunk;
  static constexpr int64_t kTokenBytes = 512 * 1024, kLeast = 8, kMost = 64;
  static_assert(4 * kRows * (kDepth + 32 * kMost) <= scratch_bytes(0));

  template <int R>
  void multiply(int64_t row, int64_t first, int64_t end) const {
    for (int64_t begin = 0; begin < cols_; begin += kDepth) {
      const int64_t depth = cols_ - begin < kDepth ? cols_ - begin : kDepth;
      for (int r = 0; r < R; ++r) {
        Row w(s_.weights + (row + r) * s_.row_bytes, cols_);
        unpack_floats(w, begin, begin + depth, rows_ + r * kDepth);
      }
      int64_t j = first;
      for (; j + kTokens <= end; j += kTokens) tile<R, kTokens>(j, j - first, begin, depth);
      if constexpr (kTokens > 2)
        for (; j + 2 <= end; j += 2) tile<R, 2>(j, j - first, begin, depth);
      if (j < end) tile<R, 1>(j, j - first, begin, depth);
    }
    for (int64_t j = first; j < end; ++j)
      for (int r = 0; r < R; ++r) {
        const float* const p = sums_of(j - first, r);
        s_.out[j * s_.out_stride + row + r] =
            sum(add(add(load(p), load(p + 8)), add(load(p + 16), load(p + 24))));
      }
  }

  float* sums_of(int64_t place, int r) const { return sums_ + (place * kRows + r) * 32; }

  // N tokens from token j on, the `place`th of their block, at `depth` values from `begin` on.
  template <int R, int N>
  void tile(int64_t j, int64_t place, int64_t begin, int64_t depth) const {
    const float* x[N];
    for (int t = 0; t < N; ++t) x[t] = x_ + token_of(s_, j + t) * cols_ + begin;
    for (int half = 0; half < 32; half += 16) {
      W16 acc[R][N];
      for (int r = 0; r < R; ++r)
        for (int t = 0; t < N; ++t)
          acc[r][t] = begin ? wide_load(sums_of(place + t, r) + half) : wide_splat(0.0f);
      for (int64_t i = half; i < depth / 32 * 32; i += 32) {
        W16 value[N];
        for (int t = 0; t < N; ++t) value[t] = wide_load(x[t] + i);
        for (int r = 0; r < R; ++r) {
          const W16 w = wide_load(rows_ + r * kDepth + i);
          for (int t = 0; t < N; ++t) acc[r][t] = fma(w, value[t], acc[r][t]);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int t = 0; t < N; ++t) store(sums_of(place + t, r) + half, acc[r][t]);
    }
    if (depth % 32)
      for (int r = 0; r < R; ++r)
        for (int t = 0; t < N; ++t)
          add_rest(rows_ + r * kDepth, x[t], depth, sums_of(place + t, r));
  }

  // The values after the last group of 32.
  static void add_rest(const float* w, const float* x, int64_t depth, float* sums) {
    for (int64_t i = depth / 32 * 32; i < depth; i += 8) {
      const int lanes = static_cast<int>(depth - i < 8 ? depth - i : 8);
      float* const at = sums + i % 32;
      store(at, fma(load_n(w + i, lanes), load_n(x + i, lanes), load(at)));
    }
  }

  const Slice& s_;
  const float* const x_;
  const int64_t cols_;
  float *const rows_, *const sums_;
};

// One token against one row.
template <class Row>
inline void dot_floats(const Slice& s, const float* x, int64_t cols, int64_t row) {
  Row w(s.weights + row * s.row_bytes, cols);
  F8 acc[4] = {zero(), zero(), zero(), zero()};
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    w.open(begin / kChunk);
    const int n = chunk_size(cols, begin);
    for (int g = 0; g < n / 32; ++g) {
      F8 value[4];
      w.group(g, value);
      for (int i = 0; i < 4; ++i)
        acc[i] = fma(value[i], load(x + begin + 32 * g + 8 * i), acc[i]);
    }
    for (int v = n / 32 * 4; 8 * v < n; ++v) {
      const int lanes = n - 8 * v < 8 ? n - 8 * v : 8;
      acc[v % 4] = fma(w.part(v, lanes), load_n(x + begin + 8 * v, lanes), acc[v % 4]);
    }
  }
  s.out[row] = sum(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
}

template <class Row>
void dot_f32(const Slice& s, const float* x, int64_t cols, void* scratch) {
  if (s.count > 1) return FloatTiles<Row>(s, x, cols, static_cast<float*>(scratch)).run();
  for (int64_t row = s.begin; row < s.end; ++row)
    dot_floats<Row>(s, x + token_of(s, 0) * cols, cols, row);
}

}  // namespace fomoe::cpu::FOMOE_ISA
