// A wave's way through its rows of a matrix.
#pragma once
#include "activations.h"

// The products of a lane's rows of a tile.
template <class T>
struct Products {
  float of[T::kDeep];
};

// The products of the lane's rows among those from `row` on, which come next out of the ring. For
// each tile that is taken the stream fetches another.
template <class F, int kCols, class Stream>
FM_DEV Products<RowTiles<F, kCols>> row_products(const Held<F, kCols>& x, int row, Ring& ring, Stream& stream) {
  using T = RowTiles<F, kCols>;
  Products<T> sums = {};
  const auto take = [&](int segment) {
    const char* const tile = ring.next();
    stream.fetch();
    x.dot(tile, T::margin(row, segment), segment, sums.of);
  };
  // Registers have no index: activations that are held make each segment code of its own.
  if constexpr (Held<F, kCols>::kHeld) {
    FM_UNROLL for (int s = 0; s < T::kSegments; ++s) take(s);
  } else {
    FM_NO_UNROLL for (int s = 0; s < T::kSegments; ++s) take(s);
  }
  FM_UNROLL for (int deep = 0; deep < T::kDeep; ++deep) sums.of[deep] = row_sum<T::kLanes>(sums.of[deep]);
  return sums;
}

template <class F, int kCols>
struct MatrixStream {
  using T = RowTiles<F, kCols>;
  Ring ring;
  int rows, stride, first;  // of the matrix; from this wave's rows to its next; its first row
  const char* from;         // the next tile: its address, row and segment
  int row, segment;

  // The wave is number `wave` of `waves` that share the matrix.
  FM_DEV MatrixStream(Ring r, const void* matrix, int all_rows, int wave, int waves)
      : ring(r), rows(all_rows), stride(waves * T::kRows), first(wave * T::kRows),
        from((const char*)matrix + T::offset(first)), row(first), segment(0) {}

  FM_DEV void fetch() {
    ring.fetch<T>(from, row < rows ? T::bytes(row, segment, rows) : 0, T::margin(row, segment));
    if (++segment < T::kSegments) {
      from += T::kSegmentBytes;
      return;
    }
    from += T::offset(stride) - (T::kSegments - 1) * T::kSegmentBytes;
    row += stride, segment = 0;
  }
  FM_DEV void start() {
    FM_UNROLL for (int i = 1; i < FM_STAGES; ++i) fetch();
  }

  // out = W x, or out += W x.
  template <bool kAdd>
  FM_DEV void multiply(const Held<F, kCols>& x, float* out) {
    for (int at = first; at < rows; at += stride) {
      const auto y = row_products<F, kCols>(x, at, ring, *this);
      FM_UNROLL for (int deep = 0; deep < T::kDeep; ++deep) {
        const int mine = at + T::lane_row(deep);
        if (T::writes() && mine < rows) out[mine] = kAdd ? out[mine] + y.of[deep] : y.of[deep];
      }
    }
  }
};
