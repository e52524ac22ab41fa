// Integer products of many tokens: lanes are rows. The order of each output is that of dot_rows.h.
//
// kRows rows of weights are unpacked into a panel (panel_fill.h), and tokens are copied into tiles,
// so that the innermost loop reads both in sequence: partial by partial, and within a partial chunk
// by chunk.
//   tile   [partial][chunk] { int8 [n][group], scale [n], sum [n] }
// A tile's `sum` is the scaled sum of the activations for types with offsets, else the int32 that
// takes the bias out of a dot.
#pragma once

#include "panel_fill.h"

namespace fomoe::cpu::FOMOE_ISA {

// Cuts tokens into tiles of kTileTokens and, at the end, of smaller powers of two.
template <class Body>
inline void for_tiles(int64_t count, const Body& body) {
  int64_t j = 0;
  for (; j + kTileTokens <= count; j += kTileTokens) body(j, Size<kTileTokens>{});
  if constexpr (kTileTokens > 4)
    if (count - j >= 4) {
      body(j, Size<4>{});
      j += 4;
    }
  if (count - j >= 2) {
    body(j, Size<2>{});
    j += 2;
  }
  if (count - j == 1) body(j, Size<1>{});
}

// One chunk of token t of a tile of n.
template <int Group>
inline void tile_chunk(const RowChunk& x, QuantShape shape, uint8_t* at, int64_t stride, int64_t n,
                       int64_t t) {
  const int bias = shape.bias == 128 ? kBiasLeft<128> : shape.bias;
  for (int p = 0; p < kChunk / Group; ++p, at += stride) {
    std::memcpy(at + Group * t, x.q + Group * p, Group);
    std::memcpy(at + Group * n + 4 * t, x.scale + p, 4);
    const int32_t start = -bias * static_cast<int32_t>(x.sums[p]);
    std::memcpy(at + (Group + 4) * n + 4 * t,
                shape.has_offset ? static_cast<const void*>(x.sums + p) : &start, 4);
  }
}

template <int Group>
inline void fill_tiles(const QuantizedRows& x, const int32_t* tokens, int64_t count,
                       QuantShape shape, uint8_t* out) {
  const int64_t chunks = row_chunks(x.cols);
  for_tiles(count, [&](int64_t j, auto size) {
    constexpr int n = decltype(size)::value;
    uint8_t* const tile = out + j * tiled_bytes(x.cols, Group);
    constexpr int64_t record = n * (Group + 8);
    for (int t = 0; t < n; ++t)
      for (int64_t c = 0; c < chunks; ++c) {
        RowChunk chunk;
        copy_chunk<Group>(x, tokens ? tokens[j + t] : j + t, c, shape.has_offset, chunk);
        tile_chunk<Group>(chunk, shape, tile + c * record, chunks * record, n, t);
      }
  });
}

inline void tile_tokens(const QuantizedRows& x, const int32_t* tokens, int64_t count,
                        QuantShape shape, uint8_t* out) {
  if (shape.group == 32) return fill_tiles<32>(x, tokens, count, shape, out);
  fill_tiles<16>(x, tokens, count, shape, out);
}

// One partial of N tokens against a panel.
template <int Bits, int Dwords, bool Offset, int N>
inline void tile_partial(const uint8_t* w, const uint8_t* x, int64_t chunks, float* out) {
  constexpr int group = 4 * Dwords, vector = 4 * kRows;
  RowFloats partial[N];
  for (RowFloats& p : partial) p = row_zero();
  for (int64_t c = 0; c < chunks; ++c) {
    const auto* const scale = reinterpret_cast<const float*>(x + group * N);
    RowInts dot[N];
    for (int t = 0; t < N; ++t)
      dot[t] =
          Offset ? row_int_zero() : row_int_splat(reinterpret_cast<const int32_t*>(scale + N + t));
    row_dots<Bits, Dwords, N>(w, reinterpret_cast<const int8_t*>(x), dot);
    const RowFloats row_scale = row_load(w + Dwords * vector);
    for (int t = 0; t < N; ++t)
      partial[t] = fma(row_float(dot[t]), mul(row_scale, row_splat(scale + t)), partial[t]);
    if constexpr (Offset) {
      const RowFloats offset = row_load(w + (Dwords + 1) * vector);
      for (int t = 0; t < N; ++t) partial[t] = fma(offset, row_splat(scale + N + t), partial[t]);
    }
    w += vector * (Dwords + 1 + Offset);
    x += (group + 8) * N;
  }
  for (int t = 0; t < N; ++t) row_store(out + kRows * t, partial[t]);
}

constexpr int kPartialTokens = 2 * kTileTokens;  // per pass over a panel; their partials fit L1

// Adds the partials [partials][kPartialTokens][kRows] of token t as total() does.
template <int Partials>
inline RowFloats add_partials(const float* partial, int64_t t) {
  RowFloats p[Partials];
  for (int i = 0; i < Partials; ++i) p[i] = row_load(partial + (i * kPartialTokens + t) * kRows);
  if constexpr (Partials == 16)
    for (int i = 0; i < 8; ++i) p[i] = add(p[i], p[i + 8]);
  const RowFloats even = add(add(p[0], p[4]), add(p[2], p[6]));
  return add(even, add(add(p[1], p[5]), add(p[3], p[7])));
}

template <class T>
inline void pass(const Slice& s, const Panel<T>& panel, const uint8_t* x, int64_t row, int64_t j,
                 float* partial) {
  constexpr int bits = kBitsMatter ? T::shape.bits : 8;
  const int64_t count = s.count - j < kPartialTokens ? s.count - j : kPartialTokens;
  const int64_t token_bytes = tiled_bytes(panel.chunks * kChunk, T::group);
  for (int p = 0; p < Panel<T>::partials; ++p)
    for_tiles(count, [&](int64_t t, auto size) {
      constexpr int n = decltype(size)::value;
      tile_partial<bits, Panel<T>::dwords, T::shape.has_offset, n>(
          panel.at(p, 0), x + (j + t) * token_bytes + p * panel.chunks * n * (T::group + 8),
          panel.chunks, partial + (p * kPartialTokens + t) * kRows);
    });
  const int64_t rows = s.end - row < kRows ? s.end - row : kRows;
  for (int64_t t = 0; t < count; ++t) {
    float* const out = s.out + (j + t) * s.out_stride + row;
    const RowFloats sums = add_partials<Panel<T>::partials>(partial, t);
    if (rows == kRows) {
      row_store(out, sums);
      continue;
    }
    float some[kRows];
    row_store(some, sums);
    std::memcpy(out, some, static_cast<size_t>(rows) * sizeof(float));
  }
}

template <class T>
void dot_panels(const Slice& s, const uint8_t* tiles, int64_t cols, void* scratch) {
  Stored* const rows = static_cast<Stored*>(scratch);
  float* const partial = reinterpret_cast<float*>(rows + kRows);
  constexpr int floats = Panel<T>::partials * kPartialTokens * kRows;
  const Panel<T> panel{reinterpret_cast<uint8_t*>(partial + floats), row_chunks(cols)};
  for (int64_t row = s.begin; row < s.end; row += kRows) {
    fill_panel<T>(panel, s, row, cols, rows);
    for (int64_t j = 0; j < s.count; j += kPartialTokens) pass<T>(s, panel, tiles, row, j, partial);
  }
}

}  // namespace fomoe::cpu::FOMOE_ISA
