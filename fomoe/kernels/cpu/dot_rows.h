// Integer products of a few tokens, row by row: lanes are the groups of a chunk.
//
// One order for each output, here and in panel.h: the dot of a group is exact, group g of every
// chunk adds to partial g, fma(dot, weight scale * activation scale, partial) and then, for types
// with offsets, fma(offset, scaled sum of activations, partial); chunks in turn. At the end
// partials i and i + 8 are added where there are 16, and sum() adds the 8.
#pragma once

#include "chunk.h"

namespace fomoe::cpu::FOMOE_ISA {

// Where a token's chunk lies.
struct TokenChunk {
  const int8_t* q;
  const float *scale, *sums;
};

inline float total(F8 partials) { return sum(partials); }
inline float total(W16 partials) { return sum(add(low_half(partials), high_half(partials))); }

template <class T, int N>
inline __attribute__((always_inline)) void take_chunk(const typename T::C& c, const TokenChunk* x,
                                                      Lanes<T::group>* partial) {
  constexpr int bias = kBiasLeft<T::shape.bias>;
  for (int t = 0; t < N; ++t) {
    auto dots = group_dots<T::group, T::shape.bias>(c.q, x[t].q);
    const auto sums = load_lanes<T::group>(x[t].sums);
    if constexpr (bias != 0) dots = fma(splat_lanes<T::group>(-bias), sums, dots);
    const auto scale = mul(c.scale, activation_scale<T::group>(x[t].scale));
    partial[t] = fma(dots, scale, partial[t]);
    if constexpr (T::shape.has_offset) partial[t] = fma(c.offset, sums, partial[t]);
  }
}

// Tokens [j, j + N) of the slice against one row; `rest` are their last chunks where rows end
// inside one.
template <class T, int N>
inline void dot_row(const Slice& s, const QuantizedRows& x, const PaddedChunk* rest, int64_t row,
                    int64_t j) {
  constexpr int per_chunk = kChunk / T::group;
  TokenChunk at[N];
  Lanes<T::group> partial[N];
  for (int t = 0; t < N; ++t) {
    const int64_t token = token_of(s, j + t);
    at[t] = {x.q + token * x.cols, x.scale + token * x.scale_stride, x.sums + token * x.sums_stride};
    partial[t] = splat_lanes<T::group>(0.0f);
  }
  const uint8_t* w = s.weights + row * s.row_bytes;
  typename T::C c;
  for (int64_t i = 0; i < x.cols / kChunk; ++i, w += T::chunk_bytes) {
    fetch_ahead(w, T::chunk_bytes);
    T::unpack(w, c);
    take_chunk<T, N>(c, at, partial);
    for (TokenChunk& a : at) a = {a.q + kChunk, a.scale + kChunk / 32, a.sums + per_chunk};
  }
  if (x.cols % kChunk) {
    unpack_rest<T>(w, x.cols % kChunk, c);
    for (int t = 0; t < N; ++t) at[t] = {rest[j + t].q, rest[j + t].scale, at[t].sums};
    take_chunk<T, N>(c, at, partial);
  }
  for (int t = 0; t < N; ++t) s.out[(j + t) * s.out_stride + row] = total(partial[t]);
}

template <class T>
void dot_rows(const Slice& s, const QuantizedRows& x, void* scratch) {
  PaddedChunk* const rest = static_cast<PaddedChunk*>(scratch);
  const int64_t values = x.cols % kChunk, whole = x.cols - values;
  for (int64_t j = 0; values && j < s.count; ++j) {
    const int64_t token = token_of(s, j);
    pad_chunk(x.q + token * x.cols + whole, x.scale + token * x.scale_stride + whole / 32, values,
              rest[j]);
  }
  for (int64_t row = s.begin; row < s.end; ++row) {
    int64_t j = 0;
    for (; j + 4 <= s.count; j += 4) dot_row<T, 4>(s, x, rest, row, j);
    if (s.count - j == 3) dot_row<T, 3>(s, x, rest, row, j);
    if (s.count - j == 2) dot_row<T, 2>(s, x, rest, row, j);
    if (s.count - j == 1) dot_row<T, 1>(s, x, rest, row, j);
  }
}

}  // namespace fomoe::cpu::FOMOE_ISA
