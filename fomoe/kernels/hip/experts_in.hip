// Gate and up of the K routed experts of one token.
//
// Defines: those of experts.h, FM_TYPE_IN of gate and up, FM_DOWN_BYTES of an expert's down, a multiple of 16;
// FM_EXPERTS: 0, or the number of experts of the layer, all of which are in slots: the kernel
// chooses the K itself.
#include "choose.h"
#include "experts.h"

using In = Product<FM_TYPE_IN>;
using InTiles = RowTiles<In, FM_HIDDEN>;

// A wave's way through gate and up rows: a set of gate rows, the same of up, the next set.
struct PairStream {
  static constexpr int kSets = ceil_div(FM_WIDTH, InTiles::kRows);  // of one expert
  Ring ring;
  const Picks& picks;
  int set, matrix, segment;  // of the next fetch
  int ahead, piece;          // bytes of down to ask for at a time, and which of them is next

  FM_DEV PairStream(Ring r, const Picks& p, const Span& next)
      : ring(r), picks(p), set(first()), matrix(0), segment(0), ahead((int)next.piece), piece(first()) {}
  // Neighbouring sets go to different groups, so that no core has all of what is left over.
  FM_DEV static int first() { return (int)(threadIdx.x / FM_WAVE * gridDim.x + blockIdx.x); }
  FM_DEV static int stride() { return (int)gridDim.x * FM_WAVES; }

  FM_DEV void fetch() {
    if (set < FM_K * kSets) {
      const int row = set % kSets * InTiles::kRows;
      const char* const rows = (const char*)picks.address[matrix][set / kSets] + InTiles::offset(row);
      ring.fetch<InTiles>(rows + segment * InTiles::kSegmentBytes,
                          InTiles::bytes(row, segment, FM_WIDTH), InTiles::margin(row, segment));
    } else {
      take_ahead();
      ring.close();
    }
    if (++segment < InTiles::kSegments) return;
    segment = 0, matrix = !matrix;
    if (!matrix) set += stride();
  }
  // As Ahead does, over the experts' downs in the order in which experts_out reads them.
  FM_DEV void take_ahead() {
    if (!ahead) return;
    const int pieces = ceil_div(FM_DOWN_BYTES, ahead), expert = piece / pieces, at = piece % pieces * ahead;
    if (expert < FM_K)
      fm_fetch_ahead((const char*)picks.address[2][expert] + at, at_most(ahead, FM_DOWN_BYTES - at));
    piece += stride();
  }
  FM_DEV void start() {
    FM_UNROLL for (int i = 1; i < FM_STAGES; ++i) fetch();
  }
  FM_DEV Products<InTiles> products(const Held<In, FM_HIDDEN>& x, int row) {
    return row_products<In, FM_HIDDEN>(x, row, ring, *this);
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
void experts_in(const float* x, const signed char* q, const fm_f2* s, Picks* picks, float* inner, Resident from,
                Span next) {
  FM_DYN_SHARED(char, memory);
  Picks& mine = *(Picks*)memory;
  using Size = InputSize<In, FM_HIDDEN>;
  const Input input = Size::in(memory + kPickBytes);
  char* const rings = memory + kPickBytes + Size::kBytes;
  // What experts_out reads that is known before the experts are: its shared expert.
  Ahead(next).take();
  fm_release_next();
  fm_wait_before();
  take_row<In, FM_HIDDEN>(input, Rows{x, q, s});
  if (FM_EXPERTS) choose_picks(from, mine, rings);
  else copy_picks(mine, *picks);
  fm_barrier();
  if (FM_EXPERTS && blockIdx.x == 0) copy_picks(*picks, mine);

  PairStream stream(Ring(rings), mine, next);
  stream.start();
  const Held<In, FM_HIDDEN> held(input);
  for (int set = stream.first(); set < FM_K * stream.kSets; set += stream.stride()) {
    const int row = set % stream.kSets * InTiles::kRows;
    const auto gate = stream.products(held, row), up = stream.products(held, row);
    FM_UNROLL for (int deep = 0; deep < InTiles::kDeep; ++deep) {
      const int mine_row = row + InTiles::lane_row(deep);
      if (InTiles::writes() && mine_row < FM_WIDTH)
        inner[set / stream.kSets * FM_WIDTH + mine_row] = silu(gate.of[deep]) * up.of[deep];
    }
  }
}
