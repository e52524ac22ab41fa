// How a wave reads rows of weights: as tiles of whole 16-byte words, several of which are on their
// way into the wave's own ring in shared memory while it multiplies the one that has come.
//
// GGUF's blocks need no alignment for that: a tile comes with the few bytes around it that make its
// words whole. Defines: FM_WAVES a group, FM_STAGES tiles of a ring, FM_TILE bytes that a tile
// should have at most, FM_STAGE_BYTES of shared memory for each.
#pragma once
#include "plain_blocks.h"

constexpr int kThreads = FM_WAVES * FM_WAVE;
FM_DEV int wave_index() { return fm_uniform((int)threadIdx.x / FM_WAVE); }

FM_DEV constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
FM_DEV constexpr int at_least(int low, int value) { return value < low ? low : value; }
FM_DEV constexpr int at_most(int high, int value) { return value > high ? high : value; }
FM_DEV constexpr int power_of_two(int least) {
  int power = 1;
  while (power < least) power *= 2;
  return power;
}

template <bool kFirst, class A, class B>
struct Either { using type = A; };
template <class A, class B>
struct Either<false, A, B> { using type = B; };
// The form of a type's products; FM_INT8 = 0 keeps activations float for quantised types, too.
template <int kType>
using Product = typename Either<FM_INT8 || Format<kType>::kBlock == 1, Format<kType>, PlainFormat<kType>>::type;

// How a wave's lanes share rows of kCols values: kLanes take one, kSide rows lie side by side, and
// a lane has kEach pieces of its row. A long row comes in kSegments tiles of kStep pieces a lane;
// of short ones a tile has kDeep for each lane, which spares it most of the work around them.
template <class F, int kCols>
struct RowTiles {
  static constexpr int kPieces = kCols / F::kPiece;
  static constexpr int kLanes = at_most(FM_WAVE, power_of_two(kPieces));
  static constexpr int kSide = FM_WAVE / kLanes;
  static constexpr int kEach = ceil_div(kPieces, kLanes);
  static constexpr int kRowBytes = kCols / F::kBlock * F::kBytes;
  static constexpr int kStepBytes = kLanes * F::kPiece / F::kBlock * F::kBytes;
  static constexpr int kStep = kEach == 1 ? 1 : at_most(kEach, at_least(1, FM_TILE / kStepBytes));
  static constexpr int kSegments = ceil_div(kEach, kStep);
  static constexpr int kDeep = kSegments > 1 ? 1 : at_least(1, at_most(4, FM_TILE / (kSide * kRowBytes)));
  static constexpr int kRows = kSide * kDeep;  // of a tile
  static constexpr int kTileBytes = kSegments == 1 ? kRows * kRowBytes : kStep * kStepBytes;
  static_assert(kCols % F::kPiece == 0 && kCols % F::kBlock == 0, "a row is whole pieces");
  static_assert(kTileBytes + 32 <= FM_STAGE_BYTES, "a tile and its margins fit into a stage");

  static constexpr int kSegmentBytes = kStep * kStepBytes;  // from one segment to the next
  // Whether all tiles begin at multiples of 16.
  static constexpr bool kAligned = kRows * kRowBytes % 16 == 0 && (kSegments == 1 || kSegmentBytes % 16 == 0);

  // Where the rows from `row` on lie in the matrix; the bytes of a segment of them, and by how much
  // it misses a multiple of 16.
  FM_DEV static long long offset(int row) { return (long long)row * kRowBytes; }
  FM_DEV static int margin(int row, int segment) {
    return kAligned ? 0 : (row * (kRowBytes % 16) + segment * kSegmentBytes) % 16;
  }
  FM_DEV static int bytes(int row, int segment, int rows) {
    if (kSegments > 1) return at_most(kTileBytes, kRowBytes - segment * kSegmentBytes);
    return kRows == 1 ? kTileBytes : at_most(kRows, rows - row) * kRowBytes;
  }
  // Row `deep` of the lane's in a tile, and whether the lane is the one that writes its product.
  FM_DEV static int lane_row(int deep) { return deep * kSide + fm_lane() / kLanes; }
  FM_DEV static bool writes() { return fm_lane() % kLanes == 0; }
};

// One wave's ring. `fetch` and `next` are called in turns, kStages - 1 fetches ahead.
struct Ring {
  char* base;
  int fill, drain;  // where the next tile goes, and where the oldest lies

  FM_DEV Ring(char* memory) : fill(0), drain(0) {
    base = memory + wave_index() * (FM_STAGES * FM_STAGE_BYTES);
  }
  FM_DEV static int after(int stage) {
    return stage == (FM_STAGES - 1) * FM_STAGE_BYTES ? 0 : stage + FM_STAGE_BYTES;
  }

  // Starts the way of `bytes` from `from`; 0 keeps the count where there is no tile any more.
  // A tile begins `margin` bytes behind a multiple of 16.
  template <class T>
  FM_DEV void fetch(const char* from, int bytes, int margin) {
    constexpr int kMost = T::kTileBytes + (T::kAligned ? 0 : 15);
    const char* const start = from - margin + 16 * fm_lane();
    char* const to = base + fill + 16 * fm_lane();
    const int end = bytes ? margin + bytes - 16 * fm_lane() : 0;
    FM_UNROLL for (int i = 0; i < kMost; i += 16 * FM_WAVE)
      if (i < end) fm_copy16(to + i, start + i);
    close();
  }
  FM_DEV void close() {
    fm_copy_commit();
    fill = after(fill);
  }
  // The oldest tile, when it has come; the one that `next` returned before may be overwritten.
  FM_DEV const char* next() {
    fm_copy_wait<FM_STAGES - 2>();
    fm_wave_sync();
    const char* const tile = base + drain;
    drain = after(drain);
    return tile;
  }
};

// The activations that a lane multiplies its pieces of a row with: in registers where a row needs
// at most FM_HELD words of them, else read from shared memory each time.
template <class F, int kCols>
struct Held {
  using T = RowTiles<F, kCols>;
  static constexpr bool kHeld = T::kEach * sizeof(typename F::Acts) <= 4 * FM_HELD;
  typename F::Acts acts[kHeld ? T::kEach : 1];
  Input input;

  FM_DEV Held(const Input& x) : input(x) {
    if (!kHeld) return;
    const int lane = fm_lane() % T::kLanes;
    FM_UNROLL for (int j = 0; j < T::kEach; ++j) {
      const int piece = j * T::kLanes + lane;
      if (piece < T::kPieces) acts[j] = F::load(x, piece, T::kPieces);
    }
  }

  // Adds the lane's share of segment `segment` of its rows, which is in `tile`, to `sums` [kDeep].
  FM_DEV void dot(const char* tile, int margin, int segment, float* sums) const {
    const int lane = fm_lane() % T::kLanes, start = margin - segment * T::kSegmentBytes;
    float tile_sums[T::kDeep] = {};
    FM_UNROLL for (int s = 0; s < T::kStep; ++s) {
      const int j = segment * T::kStep + s, piece = j * T::kLanes + lane;
      if (j >= T::kEach || piece >= T::kPieces) continue;
      const typename F::Acts x = kHeld ? acts[kHeld ? j : 0] : F::load(input, piece, T::kPieces);
      FM_UNROLL for (int deep = 0; deep < T::kDeep; ++deep)
        tile_sums[deep] += F::dot(tile, start + T::lane_row(deep) * T::kRowBytes, piece, x);
    }
    FM_UNROLL for (int deep = 0; deep < T::kDeep; ++deep) sums[deep] += tile_sums[deep];
  }
};

// The sum over the lanes that share a row, in each of them.
template <int kLanes>
FM_DEV float row_sum(float part) {
  if (kLanes == FM_WAVE) return fm_wave_sum(part);
  FM_UNROLL for (int mask = kLanes / 2; mask; mask /= 2) part += fm_wave_xor(part, mask);
  return part;
}
