// The K routed experts of one token, and the sum of theirs with the shared expert's.
//
// Experts lie in slots as GGUF blocks; `picks` says where (fomoe/kernels/gpu/step.py). Defines:
// those of tiles.h, FM_HIDDEN, FM_WIDTH, FM_K, FM_TYPE_IN (gate and up), FM_TYPE_DOWN;
// FM_EXPERTS > 0: experts_in chooses the picks itself. For experts_out FM_SHARED_WIDTH,
// FM_TYPE_SHARED and FM_ROWS that a group writes.
#include "choose.h"
#include "stream.h"

struct Picks {
  unsigned long long address[3][FM_K];  // gate, up, down
  float weight[FM_K];
  int id[FM_K];
};

FM_DEV float silu(float x) { return x / (1.0f + fm_exp(-x)); }

// ---- gate and up
using In = Product<FM_TYPE_IN>;
using InTiles = RowTiles<In, FM_HIDDEN>;

// A wave's way through gate and up rows: a set of gate rows, the same of up, the next set.
struct PairStream {
  static constexpr int kSets = ceil_div(FM_WIDTH, InTiles::kSide);  // of one expert
  Ring ring;
  const Picks& picks;
  int set, matrix, segment;  // of the next fetch

  FM_DEV PairStream(Ring r, const Picks& p) : ring(r), picks(p), set(first()), matrix(0), segment(0) {}
  FM_DEV static int first() { return (int)(blockIdx.x * FM_WAVES + threadIdx.x / FM_WAVE); }
  FM_DEV static int stride() { return (int)gridDim.x * FM_WAVES; }

  FM_DEV void fetch() {
    const char* from = nullptr;
    int bytes = 0;
    if (set < FM_K * kSets) {
      const int row = set % kSets * InTiles::kSide;
      from = (const char*)picks.address[matrix][set / kSets] + InTiles::offset(row, segment);
      bytes = InTiles::bytes(row, segment, FM_WIDTH);
    }
    ring.fetch<InTiles::kTileBytes>(from, bytes);
    if (++segment < InTiles::kSegments) return;
    segment = 0, matrix = !matrix;
    if (!matrix) set += stride();
  }
  FM_DEV void start() {
    FM_UNROLL for (int i = 1; i < FM_STAGES; ++i) fetch();
  }
  FM_DEV float product(const Held<In, FM_HIDDEN>& x, int row) {
    float sum = 0.0f;
    FM_UNROLL for (int s = 0; s < InTiles::kSegments; ++s) {
      const char* const tile = ring.next();
      fetch();
      sum += x.dot(tile, (int)(InTiles::offset(row, s) % 16), s);
    }
    return row_sum<InTiles::kLanes>(sum);
  }
};

// What experts_in chooses from: scores [E], base addresses of slots [E], places in a slot.
struct Resident {
  const float* scores;
  const unsigned long long* table;
  unsigned long long up, down;
};

// Chooses into `mine` (shared memory); `memory` is free for the work of it.
FM_DEV void choose_picks(const Resident& from, Picks& mine, char* memory) {
#if FM_EXPERTS
  using Work = Choice<FM_EXPERTS, FM_K>;
  static_assert(sizeof(Work) <= FM_WAVES * FM_STAGES * FM_STAGE_BYTES, "room to choose");
  choose<FM_EXPERTS, FM_K>(from.scores, *(Work*)memory, mine.id, mine.weight);
  if (threadIdx.x < FM_K) {
    const unsigned long long slot = from.table[mine.id[threadIdx.x]];
    mine.address[0][threadIdx.x] = slot;
    mine.address[1][threadIdx.x] = slot + from.up;
    mine.address[2][threadIdx.x] = slot + from.down;
  }
#endif
}

FM_DEV void copy_picks(Picks& to, const Picks& from) {
  constexpr int kWords = sizeof(Picks) / 4;
  for (int i = threadIdx.x; i < kWords; i += kThreads) ((unsigned*)&to)[i] = ((const unsigned*)&from)[i];
}

FM_DEV constexpr int whole16(int bytes) { return ceil_div(bytes, 16) * 16; }
constexpr int kPickBytes = whole16(sizeof(Picks));

// inner [K, width] = silu(gate h) * (up h).
FM_KERNEL(FM_WAVES * FM_WAVE)
void experts_in(const float* x, const signed char* q, const fm_f2* s, Picks* picks, float* inner, Resident from) {
  FM_DYN_SHARED(char, memory);
  Picks& mine = *(Picks*)memory;
  using Size = InputSize<In, FM_HIDDEN>;
  const Input input = Size::in(memory + kPickBytes);
  char* const rings = memory + kPickBytes + Size::kBytes;
  if (FM_EXPERTS) choose_picks(from, mine, rings);
  else copy_picks(mine, *picks);
  fm_barrier();
  if (FM_EXPERTS && blockIdx.x == 0) copy_picks(*picks, mine);

  PairStream stream(Ring(rings), mine);
  stream.start();
  take_row<In, FM_HIDDEN>(input, Rows{x, q, s});
  fm_barrier();
  const Held<In, FM_HIDDEN> held(input);
  for (int set = stream.first(); set < FM_K * stream.kSets; set += stream.stride()) {
    const int row = set % stream.kSets * InTiles::kSide, mine_row = row + fm_lane() / InTiles::kLanes;
    const float gate = stream.product(held, row), up = stream.product(held, row);
    if (fm_lane() % InTiles::kLanes == 0 && mine_row < FM_WIDTH)
      inner[set / stream.kSets * FM_WIDTH + mine_row] = silu(gate) * up;
  }
}

// ---- down
#if FM_ROWS
using Down = Product<FM_TYPE_DOWN>;
using SharedDown = Product<FM_TYPE_SHARED>;
using DownTiles = RowTiles<Down, FM_WIDTH>;
using SharedTiles = RowTiles<SharedDown, FM_SHARED_WIDTH>;

// The tasks of a group: the rows of each expert in turn, then those of the shared one, set by set.
struct DownStream {
  static constexpr int kSets = ceil_div(FM_ROWS, DownTiles::kSide);
  static constexpr int kSharedSets = ceil_div(FM_ROWS, SharedTiles::kSide);
  static constexpr int kRouted = FM_K * kSets, kTasks = kRouted + kSharedSets;
  static constexpr int kMostBytes = at_least(DownTiles::kTileBytes, SharedTiles::kTileBytes);
  Ring ring;
  const Picks& picks;
  const char* shared;
  int task, segment;  // of the next fetch

  FM_DEV DownStream(Ring r, const Picks& p, const void* down)
      : ring(r), picks(p), shared((const char*)down), task((int)threadIdx.x / FM_WAVE), segment(0) {}

  template <class T>
  FM_DEV void fetch_of(const char* weights, int set) {
    const int row = blockIdx.x * FM_ROWS + set * T::kSide;
    ring.fetch<kMostBytes>(weights + T::offset(row, segment),
                           row < FM_HIDDEN ? T::bytes(row, segment, FM_HIDDEN) : 0);
    if (++segment < T::kSegments) return;
    segment = 0, task += FM_WAVES;
  }
  FM_DEV void fetch() {
    if (task < kRouted) fetch_of<DownTiles>((const char*)picks.address[2][task / kSets], task % kSets);
    else if (task < kTasks) fetch_of<SharedTiles>(shared, task - kRouted);
    else ring.fetch<16>(nullptr, 0);
  }
  FM_DEV void start() {
    FM_UNROLL for (int i = 1; i < FM_STAGES; ++i) fetch();
  }

  // Writes the products of the set's rows to `out` (shared memory).
  template <class F, int kCols>
  FM_DEV void product(const Input& x, int set, float* out) {
    using T = RowTiles<F, kCols>;
    const Held<F, kCols> held(x);
    const int row = blockIdx.x * FM_ROWS + set * T::kSide, mine = set * T::kSide + fm_lane() / T::kLanes;
    float sum = 0.0f;
    FM_UNROLL for (int s = 0; s < T::kSegments; ++s) {
      const char* const tile = ring.next();
      fetch();
      sum += held.dot(tile, (int)(T::offset(row, s) % 16), s);
    }
    sum = row_sum<T::kLanes>(sum);
    if (fm_lane() % T::kLanes == 0 && mine < FM_ROWS) out[mine] = sum;
  }
};

// The vectors of all experts in shared memory: K of the routed ones, then the shared one's.
struct Inners {
  using Size = InputSize<Down, FM_WIDTH>;
  using SharedSize = InputSize<SharedDown, FM_SHARED_WIDTH>;
  static constexpr int kBytes = FM_K * Size::kBytes + SharedSize::kBytes;
  char* memory;
  FM_DEV Input routed(int expert) const { return Size::in(memory + expert * Size::kBytes); }
  FM_DEV Input shared() const { return SharedSize::in(memory + FM_K * Size::kBytes); }

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

// x = (sum of weight_e * down_e inner_e, a chain of fma in ascending id, + shared) + x.
FM_KERNEL(FM_WAVES * FM_WAVE)
void experts_out(const Picks* picks, const float* inner, SharedExpert shared, float* x) {
  FM_DYN_SHARED(char, memory);
  constexpr int kOutBytes = whole16((FM_K + 1) * FM_ROWS * 4);
  Picks& mine = *(Picks*)memory;
  float* const out = (float*)(memory + kPickBytes);
  const Inners inners{memory + kPickBytes + kOutBytes};
  Spread<FM_K * FM_WIDTH> routed;
  Spread<FM_SHARED_WIDTH> gate, up;
  copy_picks(mine, *picks);
  routed.read(inner), gate.read(shared.gate), up.read(shared.up);
  fm_barrier();
  DownStream stream(Ring(memory + kPickBytes + kOutBytes + Inners::kBytes), mine, shared.down);
  stream.start();
  inners.put(routed);
  inners.put_shared(gate, up);
  fm_barrier();

  using S = DownStream;
  for (int task = threadIdx.x / FM_WAVE; task < S::kTasks; task += FM_WAVES) {
    if (task < S::kRouted) {
      const int expert = task / S::kSets;
      stream.product<Down, FM_WIDTH>(inners.routed(expert), task % S::kSets, out + expert * FM_ROWS);
    } else {
      stream.product<SharedDown, FM_SHARED_WIDTH>(inners.shared(), task - S::kRouted, out + FM_K * FM_ROWS);
    }
  }
  fm_barrier();
  const float scale = 1.0f / (1.0f + fm_exp(-*shared.scale));
  for (int i = threadIdx.x; i < FM_ROWS && blockIdx.x * FM_ROWS + i < FM_HIDDEN; i += kThreads) {
    float sum = 0.0f;
    for (int e = 0; e < FM_K; ++e) sum = fm_fma(mine.weight[e], out[e * FM_ROWS + i], sum);
    float& to = x[blockIdx.x * FM_ROWS + i];
    to = (sum + out[FM_K * FM_ROWS + i] * scale) + to;
  }
}
#endif
