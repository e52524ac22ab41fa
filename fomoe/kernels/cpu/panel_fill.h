// Panels: kRows rows of weights, unpacked and side by side.
//   panel  [partial][chunk] { dwords of quants [group / 4][kRows], scale [kRows], offset [kRows] }
#pragma once

#include <type_traits>

#include "chunk.h"

namespace fomoe::cpu::FOMOE_ISA {

template <int N>
using Size = std::integral_constant<int, N>;

template <class T>
struct Panel {
  static constexpr int group = T::group, partials = kChunk / group, dwords = group / 4;
  static constexpr int vector = 4 * kRows;  // bytes
  static constexpr int record = vector * (dwords + 1 + (T::shape.has_offset ? 1 : 0));

  uint8_t* data;
  int64_t chunks;
  uint8_t* at(int p, int64_t chunk) const { return data + (p * chunks + chunk) * record; }

  // The quants of 16 values of every row, from value v of the chunk on.
  FOMOE_INLINE void put(int64_t chunk, int v, const RowBytes* four) const {
    uint8_t* const to = at(v / group, chunk) + v % group / 4 * vector;
    for (int i = 0; i < 4; ++i) row_store(to + i * vector, four[i]);
  }
  // One number per group of every row: scales at place dwords of a record, offsets behind them.
  void put_numbers(int64_t chunk, const float* rows, int place) const {
    for (int p = 0; p < partials; p += 4) {
      RowBytes four[4];
      transpose_rows(reinterpret_cast<const uint8_t*>(rows + p), sizeof(Stored), four);
      for (int i = 0; i < 4; ++i) row_store(at(p + i, chunk) + place * vector, four[i]);
    }
  }
};

// How the quants of a type get into a panel: in general row by row through Stored. Types whose
// packed bytes can be laid side by side first, and unpacked then for all rows at once, have a form
// of their own; base is their first row's chunk.
template <class T>
struct PanelForm {
  static constexpr bool packed = false;
  static void put(const Panel<T>&, int64_t, const uint8_t*, int64_t) {}
};

FOMOE_INLINE void mask_four(RowBytes* four, int mask) {
  for (int i = 0; i < 4; ++i) four[i] = and_(four[i], row_bytes(mask));
}
// out = the bits of `from`, shifted right by N (left where negative), that `mask` has
template <int N>
FOMOE_INLINE void shift_four(const RowBytes* from, int mask, RowBytes* out) {
  for (int i = 0; i < 4; ++i) out[i] = and_(row_shift<N>(from[i]), row_bytes(mask));
}
FOMOE_INLINE void or_four(RowBytes* four, const RowBytes* with) {
  for (int i = 0; i < 4; ++i) four[i] = or_(four[i], with[i]);
}

template <>
struct PanelForm<Q8_0> {
  static constexpr bool packed = true;
  static void put(const Panel<Q8_0>& panel, int64_t chunk, const uint8_t* base, int64_t row_bytes) {
    for (int v = 0; v < kChunk; v += 16) {
      RowBytes four[4];
      const uint8_t* const block = base + v / 32 * sizeof(BlockQ8_0);
      transpose_rows(block + offsetof(BlockQ8_0, q) + v % 32, row_bytes, four);
      for (RowBytes& q : four) q = flip_top_bit(q);
      panel.put(chunk, v, four);
    }
  }
};

template <>
struct PanelForm<Q4_K> {
  static constexpr bool packed = true;
  static void put(const Panel<Q4_K>& panel, int64_t chunk, const uint8_t* base, int64_t row_bytes) {
    for (int i = 0; i < 8; ++i) {  // 16 bytes of the nibbles of groups i / 2 * 2 and the next
      const int v = i / 2 * 64 + i % 2 * 16;
      RowBytes both[4], high[4];
      transpose_rows(base + offsetof(BlockQ4_K, q) + 16 * i, row_bytes, both);
      shift_four<4>(both, 15, high);
      mask_four(both, 15);
      panel.put(chunk, v, both);
      panel.put(chunk, v + 32, high);
    }
  }
};

template <>
struct PanelForm<Q5_K> {
  static constexpr bool packed = true;
  static void put(const Panel<Q5_K>& panel, int64_t chunk, const uint8_t* base, int64_t row_bytes) {
    for (int half = 0; half < 2; ++half) {
      RowBytes bits[4];
      transpose_rows(base + offsetof(BlockQ5_K, high) + 16 * half, row_bytes, bits);
      const auto two_groups = [&](auto pair) __attribute__((always_inline)) {
        constexpr int j = decltype(pair)::value;
        RowBytes low[4], high[4], fifth[4];
        transpose_rows(base + offsetof(BlockQ5_K, q) + 32 * j + 16 * half, row_bytes, low);
        shift_four<4>(low, 15, high);
        mask_four(low, 15);
        shift_four<2 * j - 4>(bits, 16, fifth);
        or_four(low, fifth);
        shift_four<2 * j - 3>(bits, 16, fifth);
        or_four(high, fifth);
        panel.put(chunk, 64 * j + 16 * half, low);
        panel.put(chunk, 64 * j + 32 + 16 * half, high);
      };
      two_groups(Size<0>{});
      two_groups(Size<1>{});
      two_groups(Size<2>{});
      two_groups(Size<3>{});
    }
  }
};

template <>
struct PanelForm<Q6_K> {
  static constexpr bool packed = true;
  static void put(const Panel<Q6_K>& panel, int64_t chunk, const uint8_t* base, int64_t row_bytes) {
    for (int i = 0; i < 4; ++i) {  // 16 bytes of the top bits of 4 groups of 32
      const int v = i / 2 * 128 + i % 2 * 16;
      RowBytes top[4];
      transpose_rows(base + offsetof(BlockQ6_K, high) + 16 * i, row_bytes, top);
      const auto two_groups = [&](auto pair) __attribute__((always_inline)) {
        constexpr int j = decltype(pair)::value;  // low nibbles of group j, high ones of j + 2
        RowBytes low[4], high[4], bits[4];
        transpose_rows(base + offsetof(BlockQ6_K, low) + v / 2 + i % 2 * 8 + 32 * j, row_bytes,
                       low);
        shift_four<4>(low, 15, high);
        mask_four(low, 15);
        shift_four<2 * j - 4>(top, 48, bits);
        or_four(low, bits);
        shift_four<2 * j>(top, 48, bits);
        or_four(high, bits);
        panel.put(chunk, v + 32 * j, low);
        panel.put(chunk, v + 64 + 32 * j, high);
      };
      two_groups(Size<0>{});
      two_groups(Size<1>{});
    }
  }
};

// Rows first .. first + kRows of the slice; those past its end repeat the last one.
template <class T>
inline void fill_panel(const Panel<T>& panel, const Slice& s, int64_t first, int64_t cols,
                       Stored* rows) {
  const bool whole = first + kRows <= s.end;
  for (int64_t c = 0; c < panel.chunks; ++c) {
    const bool packed = PanelForm<T>::packed && whole && (c + 1) * kChunk <= cols;
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r < s.end ? first + r : s.end - 1;
      const uint8_t* const w = s.weights + row * s.row_bytes;
      typename T::C chunk;
      unpack_at<T>(w, cols, c, chunk);
      for (int i = 0; i < T::chunk_bytes; i += 64)  // of the next panel
        __builtin_prefetch(w + kRows * s.row_bytes + c * T::chunk_bytes + i);
      if (!packed) store_quants<T>(chunk, rows[r]);
      store_numbers<T>(chunk, rows[r]);
    }
    if (packed)
      PanelForm<T>::put(panel, c, s.weights + first * s.row_bytes + c * T::chunk_bytes,
                        s.row_bytes);
    for (int v = 0; !packed && v < kChunk; v += 16) {
      RowBytes four[4];
      transpose_rows(rows->q + v, sizeof(Stored), four);
      panel.put(c, v, four);
    }
    panel.put_numbers(c, rows->scale, Panel<T>::dwords);
    if constexpr (T::shape.has_offset) panel.put_numbers(c, rows->offset, Panel<T>::dwords + 1);
  }
}

}  // namespace fomoe::cpu::FOMOE_ISA
