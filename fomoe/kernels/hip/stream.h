// A wave's way through its rows of a matrix.
#pragma once
#include "activations.h"

// The product of the lane's row among those from `row` on, which come next out of the ring. For each
// tile that is taken the stream fetches another.
template <class F, int kCols, class Stream>
FM_DEV float row_product(const Held<F, kCols>& x, int row, Ring& ring, Stream& stream) {
  using T = RowTiles<F, kCols>;
  float sum = 0.0f;
  const auto take = [&](int segment) {
    const char* const tile = ring.next();
    stream.fetch();
    sum += x.dot(tile, T::margin(row, segment), segment);
  };
  // Registers have no index: activations that are held make each segment code of its own.
  if constexpr (Held<F, kCols>::kHeld) {
    FM_UNROLL for (int s = 0; s < T::kSegments; ++s) take(s);
  } else {
    FM_NO_UNROLL for (int s = 0; s < T::kSegments; ++s) take(s);
  }
  return row_sum<T::kLanes>(sum);
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
      : ring(r), rows(all_rows), stride(waves * T::kSide), first(wave * T::kSide),
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

  // The product of the lane's row among those from `at` on, which are the next of this wave.
  FM_DEV float product(const Held<F, kCols>& x, int at) {
    return row_product<F, kCols>(x, at, ring, *this);
  }

  // out = W x, or out += W x.
  template <bool kAdd>
  FM_DEV void multiply(const Held<F, kCols>& x, float* out) {
    for (int at = first; at < rows; at += stride) {
      const float y = product(x, at);
      const int mine = at + fm_lane() / T::kLanes;
      if (fm_lane() % T::kLanes == 0 && mine < rows) out[mine] = kAdd ? out[mine] + y : y;
    }
  }
};
