// Down of the K routed experts of one token, and their sum with the shared expert and the residual.
//
// A group writes FM_ROWS rows of all: its waves take the experts' rows in turns, and their products
// are added up in the end, so that the order of the sum is always the same.
// Defines: those of experts.h, FM_TYPE_DOWN, FM_SHARED_WIDTH, FM_TYPE_SHARED, FM_ROWS, FM_PARTS: 1 writes
// the routed sum alone; 2 takes that sum as `inner`, adds the rest, and reads no picks; 3 does both.
#include "experts.h"

constexpr bool kHasRouted = FM_PARTS & 1, kHasShared = FM_PARTS & 2;

using Down = Product<FM_TYPE_DOWN>;
using SharedDown = Product<FM_TYPE_SHARED>;
using DownTiles = RowTiles<Down, FM_WIDTH>;
using SharedTiles = RowTiles<SharedDown, FM_SHARED_WIDTH>;

// The tasks of a group: the rows of the shared expert, which are known before the token has chosen,
// then those of each routed one in turn, set by set.
struct DownStream {
  static constexpr int kSets = ceil_div(FM_ROWS, DownTiles::kRows);
  static constexpr int kSharedSets = kHasShared ? ceil_div(FM_ROWS, SharedTiles::kRows) : 0;
  Ring ring;
  const Picks& picks;
  const char* shared;
  Computed computed;
  int task, segment;  // of the next fetch
  int begun;          // fetches before the first tile is taken

  FM_DEV DownStream(Ring r, const Picks& p, const void* down)
      : ring(r), picks(p), shared((const char*)down), task(wave_index()), segment(0), begun(0) {}
  FM_DEV int tasks() const { return kSharedSets + (kHasRouted ? computed.count() * kSets : 0); }
  FM_DEV static int expert(int task) { return (task - kSharedSets) / kSets; }
  FM_DEV static int set(int task) { return (task - kSharedSets) % kSets; }

  // Rows end with the group's or the matrix, where these are not whole tiles.
  template <class T>
  FM_DEV static int bytes(int row, int segment) {
    if (FM_HIDDEN % FM_ROWS == 0 && FM_ROWS % T::kRows == 0) return T::bytes(0, segment, T::kRows);
    const int end = at_most(FM_HIDDEN, (int)(blockIdx.x + 1) * FM_ROWS);
    return row < end ? T::bytes(row, segment, end) : 0;
  }
  template <class T>
  FM_DEV void fetch_of(const char* weights, int set) {
    const int row = blockIdx.x * FM_ROWS + set * T::kRows;
    ring.fetch<T>(weights + T::offset(row) + segment * T::kSegmentBytes, bytes<T>(row, segment),
                  T::margin(row, segment));
    if (++segment < T::kSegments) return;
    segment = 0, task += FM_WAVES;
  }
  FM_DEV void fetch() {
    if (task < kSharedSets) fetch_of<SharedTiles>(shared, task);
    else if (task < tasks()) fetch_of<DownTiles>((const char*)picks.address[2][expert(task)], set(task));
    else ring.close();
  }
  // What needs no picks, then the rest of what the ring holds.
  FM_DEV void begin() {
    for (; begun < FM_STAGES - 1 && task < kSharedSets; ++begun) fetch();
  }
  FM_DEV void start() {
    computed.take(picks);
    for (; begun < FM_STAGES - 1; ++begun) fetch();
  }

  // Writes the products of the set's rows to `out` (shared memory).
  template <class F, int kCols>
  FM_DEV void product(const Input& x, int set, float* out) {
    using T = RowTiles<F, kCols>;
    const int row = blockIdx.x * FM_ROWS + set * T::kRows;
    const auto sums = row_products<F, kCols>(Held<F, kCols>(x), row, ring, *this);
    FM_UNROLL for (int deep = 0; deep < T::kDeep; ++deep) {
      const int mine = set * T::kRows + T::lane_row(deep);
      if (T::writes() && mine < FM_ROWS) out[mine] = sums.of[deep];
    }
  }
};

// The vectors of all experts in shared memory: K of the routed ones, then the shared one's.
struct Inners {
  using Size = InputSize<Down, FM_WIDTH>;
  using SharedSize = InputSize<SharedDown, FM_SHARED_WIDTH>;
  static constexpr int kRoutedBytes = kHasRouted ? FM_K * Size::kBytes : 0;
  static constexpr int kBytes = kRoutedBytes + (kHasShared ? SharedSize::kBytes : 0);
  char* memory;
  FM_DEV Input routed(int expert) const { return Size::in(memory + expert * Size::kBytes); }
  FM_DEV Input shared() const { return SharedSize::in(memory + kRoutedBytes); }

  FM_DEV void put(const Spread<FM_K * FM_WIDTH>& inner) const {
    using All = Spread<FM_K * FM_WIDTH>;
    FM_UNROLL for (int j = 0; j < All::kEach; ++j) {
      const int quad = (int)threadIdx.x + j * kThreads;
      const Quantised q = quantise(inner.at[j]);
      if (quad < All::kQuads)
        put_quad<Down, FM_WIDTH>(routed(quad / (FM_WIDTH / 4)), quad % (FM_WIDTH / 4), q, inner.at[j]);
    }
  }
  FM_DEV void put_shared(const Spread<FM_SHARED_WIDTH>& gate, const Spread<FM_SHARED_WIDTH>& up) const {
    using All = Spread<FM_SHARED_WIDTH>;
    FM_UNROLL for (int j = 0; j < All::kEach; ++j) {
      const int quad = (int)threadIdx.x + j * kThreads;
      const fm_f4 &g = gate.at[j], &u = up.at[j];
      const fm_f4 v = {silu(g.x) * u.x, silu(g.y) * u.y, silu(g.z) * u.z, silu(g.w) * u.w};
      const Quantised q = quantise(v);
      if (quad < All::kQuads) put_quad<SharedDown, FM_SHARED_WIDTH>(shared(), quad, q, v);
    }
  }
};

// What the shared expert leaves to experts_out: gate h, up h [F], and the logit of its weight.
struct SharedExpert {
  const float *gate, *up, *scale;
  const void* down;
};

// x = (sum of weight_e * down_e inner_e, a chain of fma in ascending id, + shared) + x, over the
// experts that are computed here.
FM_KERNEL(FM_WAVES * FM_WAVE)
void experts_out(const Picks* picks, const float* inner, SharedExpert shared, float* x) {
  FM_DYN_SHARED(char, memory);
  constexpr int kOutBytes = whole16(((FM_K + 2) * FM_ROWS + 1) * 4);
  Picks& mine = *(Picks*)memory;
  float* const out = (float*)(memory + kPickBytes);  // of each expert, of the shared one; x before
  float *const shared_out = out + FM_K * FM_ROWS, *const before = shared_out + FM_ROWS, *const logit = before + FM_ROWS;
  const int first = blockIdx.x * FM_ROWS, rows = at_most(FM_ROWS, FM_HIDDEN - first);
  const Inners inners{memory + kPickBytes + kOutBytes};
  DownStream stream(Ring(memory + kPickBytes + kOutBytes + Inners::kBytes), mine, shared.down);
  stream.begin();
  Spread<FM_K * FM_WIDTH> routed;
  fm_release_next();
  fm_wait_before();
  if (kHasRouted) {
    copy_picks(mine, *picks);
    routed.read(inner);
  }
  fm_barrier();
  stream.start();
  Spread<FM_SHARED_WIDTH> gate, up;
  if (kHasShared) gate.read(shared.gate), up.read(shared.up);
  if (kHasRouted) inners.put(routed);
  if (kHasShared) {
    inners.put_shared(gate, up);
    if (threadIdx.x == 0) *logit = *shared.scale;
    for (int i = threadIdx.x; i < rows; i += kThreads) before[i] = x[first + i];
  }
  fm_barrier();

  using S = DownStream;
  for (int task = wave_index(); task < stream.tasks(); task += FM_WAVES) {
    if (task < S::kSharedSets) {
      stream.product<SharedDown, FM_SHARED_WIDTH>(inners.shared(), task, shared_out);
    } else {
      const int expert = S::expert(task);
      stream.product<Down, FM_WIDTH>(inners.routed(expert), S::set(task), out + expert * FM_ROWS);
    }
  }
  fm_barrier();
  const float scale = kHasShared ? 1.0f / (1.0f + fm_exp(-*logit)) : 0.0f;
  for (int i = threadIdx.x; i < rows; i += kThreads) {
    float sum = kHasRouted ? 0.0f : inner[first + i];
    if (kHasRouted) {
      FM_UNROLL for (int e = 0; e < FM_K; ++e)
        if (e < stream.computed.count()) sum = fm_fma(mine.weight[e], out[e * FM_ROWS + i], sum);
    }
    x[first + i] = kHasShared ? (sum + shared_out[i] * scale) + before[i] : sum;
  }
}
