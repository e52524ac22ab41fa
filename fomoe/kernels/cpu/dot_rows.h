// Integer products of a few tokens, row by row: lanes are the groups of a chunk.
//
// One order for each output, here and in panel.h: the dot of a group is exact, group g of every
// chunk adds to partial g, fma(dot, weight scale * activation scale, partial) and then, for types
// with offsets, fma(offset, scaled sum of activations, partial); chunks in turn. At the end
// partials i and i + 8 are added where there are 16, and sum() adds the 8.
#pragma once

#include "row_form.h"

namespace fomoe::cpu::FOMOE_ISA {

inline float total(F8 partials) { return sum(partials); }
inline float total(W16 partials) { return sum(add(low_half(partials), high_half(partials))); }

template <class T, int N>
FOMOE_INLINE void take_chunk(const typename T::C& c, const RowChunk* const* x,
                             Lanes<T::group>* partial) {
  constexpr int bias = kBiasLeft<T::shape.bias>;
  for (int t = 0; t < N; ++t) {
    auto dots = RowForm<T>::dots(c.q, x[t]->q);
    if constexpr (bias != 0)
      dots = fma(splat_lanes<T::group>(-bias), load_lanes<T::group>(x[t]->sums), dots);
    const auto scale = mul(c.scale, load_lanes<T::group>(x[t]->scale));
    partial[t] = fma(dots, scale, partial[t]);
    if constexpr (T::shape.has_offset)
      partial[t] = fma(c.offset, load_lanes<T::group>(x[t]->sums), partial[t]);
  }
}

// Tokens [j, j + N) of the slice against one row.
template <class T, int N>
inline void dot_row(const Slice& s, const RowChunk* x, int64_t cols, int64_t row, int64_t j) {
  const int64_t chunks = row_chunks(cols);
  const RowChunk* at[N];
  Lanes<T::group> partial[N];
  for (int t = 0; t < N; ++t) {
    at[t] = x + token_of(s, j + t) * chunks;
    partial[t] = splat_lanes<T::group>(0.0f);
  }
  const uint8_t* w = s.weights + row * s.row_bytes;
  const auto take = [&](const uint8_t* block) __attribute__((always_inline)) {
    typename T::C c;
    RowForm<T>::unpack(block, c);
    take_chunk<T, N>(c, at, partial);
    for (const RowChunk*& a : at) ++a;
  };
  for (int64_t i = 0; i < cols / kChunk; ++i, w += T::chunk_bytes) {
    fetch_ahead<T>(w);
    take(w);
  }
  if (T::elements < kChunk && cols % kChunk) {
    uint8_t padded[T::chunk_bytes];
    pad_blocks<T>(w, cols % kChunk, padded);
    take(padded);
  }
  for (int t = 0; t < N; ++t)
    s.out[(j + t) * s.out_stride + row] = total(RowForm<T>::natural(partial[t]));
}

// Rows of a half, a quarter or an eighth of a chunk: as many as fill one are taken together, lanes
// [r * n, (r + 1) * n) are row r's. Their activations stand side by side as often (fill_rows).
constexpr bool is_short(int64_t cols) { return cols < kChunk && kChunk % cols == 0; }

// What total() gives for partials of which the first n are a row's and the others 0.
inline float total_of_first(const float* p, int64_t n) {
  if (n == 1) return p[0] + 0.0f;
  if (n == 2) return (p[0] + 0.0f) + (p[1] + 0.0f);
  return ((p[0] + 0.0f) + (p[2] + 0.0f)) + ((p[1] + 0.0f) + (p[3] + 0.0f));
}

// Returns the first row that is left.
template <class T>
int64_t dot_short_rows(const Slice& s, const RowChunk* x, int64_t cols) {
  const int64_t n = cols / 32, together = kChunk / cols;
  int64_t row = s.begin;
  for (; row + together <= s.end; row += together) {
    const uint8_t* const w = s.weights + row * s.row_bytes;
    typename T::C c;
    fetch_ahead<T>(w);
    RowForm<T>::unpack(w, c);
    for (int64_t j = 0; j < s.count; ++j) {
      const RowChunk* const at = x + token_of(s, j);
      Lanes<T::group> partial[1] = {splat_lanes<T::group>(0.0f)};
      take_chunk<T, 1>(c, &at, partial);
      alignas(32) float lanes[8];
      store(lanes, RowForm<T>::natural(partial[0]));
      float* const out = s.out + j * s.out_stride + row;
      for (int64_t r = 0; r < together; ++r) out[r] = total_of_first(lanes + r * n, n);
    }
  }
  return row;
}

// One token and rows of one chunk: what is copied here stays in registers from row to row.
template <class T>
void dot_chunk_rows(const Slice& s, const RowChunk* x) {
  const RowChunk own = x[token_of(s, 0)];
  const RowChunk* const at = &own;
  for (int64_t row = s.begin; row < s.end; ++row) {
    const uint8_t* const w = s.weights + row * s.row_bytes;
    typename T::C c;
    Lanes<T::group> partial[1] = {splat_lanes<T::group>(0.0f)};
    fetch_ahead<T>(w);
    RowForm<T>::unpack(w, c);
    take_chunk<T, 1>(c, &at, partial);
    s.out[row] = total(RowForm<T>::natural(partial[0]));
  }
}

template <class T>
void dot_rows(const Slice& s, const RowChunk* x, int64_t cols) {
  if (cols == kChunk && s.count == 1) return dot_chunk_rows<T>(s, x);
  int64_t row = s.begin;
  if constexpr (T::elements < kChunk)
    if (is_short(cols)) row = dot_short_rows<T>(s, x, cols);
  for (; row < s.end; ++row) {
    int64_t j = 0;
    for (; j + 4 <= s.count; j += 4) dot_row<T, 4>(s, x, cols, row, j);
    if (s.count - j == 3) dot_row<T, 3>(s, x, cols, row, j);
    if (s.count - j == 2) dot_row<T, 2>(s, x, cols, row, j);
    if (s.count - j == 1) dot_row<T, 1>(s, x, cols, row, j);
  }
}

// Copies the first `cols` values, their scales and sums over the whole chunk.
inline void repeat(int64_t cols, RowChunk& chunk) {
  for (int64_t at = cols; at < kChunk; at += cols) {
    std::memcpy(chunk.q + at, chunk.q, static_cast<size_t>(cols));
    std::memcpy(chunk.scale + at / 32, chunk.scale, static_cast<size_t>(cols / 32) * sizeof(float));
    std::memcpy(chunk.sums + at / 32, chunk.sums, static_cast<size_t>(cols / 32) * sizeof(float));
  }
}

template <class T>
void fill_rows(const QuantizedRows& x, int64_t first, int64_t count, RowChunk* out) {
  const int64_t chunks = row_chunks(x.cols);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < chunks; ++c, ++out) {
      copy_chunk<T::group>(x, first + i, c, T::shape.has_offset, *out);
      if constexpr (T::elements < kChunk)
        if (is_short(x.cols)) repeat(x.cols, *out);
      RowForm<T>::arrange(*out);
    }
}

}  // namespace fomoe::cpu::FOMOE_ISA
