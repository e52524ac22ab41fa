// Gate and up of the K routed experts of one token.
//
// Defines: those of experts.h, FM_TYPE_IN of gate and up; FM_EXPERTS: 0, or the number of experts
// of the layer, all of which are in slots: the kernel chooses the K itself.
#include "choose.h"
#include "experts.h"

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
    if (set < FM_K * kSets) {
      const int row = set % kSets * InTiles::kSide;
      const char* const rows = (const char*)picks.address[matrix][set / kSets] + InTiles::offset(row);
      ring.fetch<InTiles>(rows + segment * InTiles::kSegmentBytes,
                          InTiles::bytes(row, segment, FM_WIDTH), InTiles::margin(row, segment));
    } else {
      ring.close();
    }
    if (++segment < InTiles::kSegments) return;
    segment = 0, matrix = !matrix;
    if (!matrix) set += stride();
  }
  FM_DEV void start() {
    FM_UNROLL for (int i = 1; i < FM_STAGES; ++i) fetch();
  }
  FM_DEV float product(const Held<In, FM_HIDDEN>& x, int row) {
    return row_product<In, FM_HIDDEN>(x, row, ring, *this);
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
