// Gate and up of the K routed experts of one token.
//
// Defines: those of experts.h, FM_TYPE_IN of gate and up;
// FM_EXPERTS: 0, or the number of experts of the layer: the kernel chooses the K itself, whose bytes
// are in slots, or late.
#include "choose.h"
#include "experts.h"

using In = Product<FM_TYPE_IN>;
using InTiles = RowTiles<In, FM_HIDDEN>;

// A wave's way through gate and up rows: a set of gate rows, the same of up, the next set.
struct PairStream {
  static constexpr int kSets = ceil_div(FM_WIDTH, InTiles::kRows);  // of one expert
  Ring ring;
  const Picks& picks;
  Computed computed;
  const Due& due;
  int set, matrix, segment;  // of the next fetch

  FM_DEV PairStream(Ring r, const Picks& p, const Due& d)
      : ring(r), picks(p), due(d), set(first()), matrix(0), segment(0) {
    computed.take(p);
  }
  // Neighbouring sets go to different groups, so that no core has all of what is left over.
  FM_DEV static int first() { return wave_index() * (int)gridDim.x + (int)blockIdx.x; }
  FM_DEV int sets() const { return (FM_TURN ? due.count() : computed.count()) * kSets; }
  FM_DEV int pick(int set) const { return FM_TURN ? due.pick(set / kSets) : set / kSets; }
  FM_DEV static int stride() { return (int)gridDim.x * FM_WAVES; }

  FM_DEV void fetch() {
    if (set < sets()) {
      const int row = set % kSets * InTiles::kRows;
      const char* const rows = (const char*)picks.address[matrix][pick(set)] + InTiles::offset(row);
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
  FM_DEV Products<InTiles> products(const Held<In, FM_HIDDEN>& x, int row) {
    return row_products<In, FM_HIDDEN>(x, row, ring, *this);
  }
};

// What experts_in chooses from: scores [E], base addresses of slots [E], which no launch beside this one
// writes, and places in a slot; and, for turns, which picks are late.
struct Resident {
  const float* scores;
  const unsigned long long* table;
  unsigned long long up, down;
  const unsigned* late;

  FM_DEV void put(Picks& picks, int pick, unsigned long long slot) const {
    picks.address[0][pick] = slot;
    picks.address[1][pick] = slot + up;
    picks.address[2][pick] = slot + down;
  }
};

#if FM_EXPERTS
// Shared memory to choose in, which the rings take afterwards.
struct Choosing {
  Choice<FM_EXPERTS, FM_K> work;
  unsigned long long table[FM_EXPERTS];

  // The table is here before anybody needs an address of it.
  FM_DEV void begin(const Resident& from) {
    for (int i = threadIdx.x; i < FM_EXPERTS; i += kThreads) table[i] = from.table[i];
  }
  // Chooses into `mine` (shared memory); a barrier has passed when it returns.
  FM_DEV void end(const Resident& from, Picks& mine) {
    choose<FM_EXPERTS, FM_K>(from.scores, work, mine.id, mine.weight);
    if (threadIdx.x < FM_K) from.put(mine, threadIdx.x, table[mine.id[threadIdx.x]]);
    fm_barrier();
  }
};
static_assert(sizeof(Choosing) <= FM_WAVES * FM_STAGES * FM_STAGE_BYTES, "room to choose");
#else
struct Choosing {
  FM_DEV void begin(const Resident&) {}
  FM_DEV void end(const Resident&, Picks&) {}
};
#endif

// inner [K, width] = silu(gate h) * (up h), of those whose turn it is.
//
// The second turn finds late ones in the table, and writes where: what the first turn wrote of these
// nobody has read.
FM_KERNEL(FM_WAVES * FM_WAVE)
void experts_in(const float* x, const signed char* q, const fm_f2* s, Picks* picks, float* inner, Resident from) {
  FM_DYN_SHARED(char, memory);
  Picks& mine = *(Picks*)memory;
  using Size = InputSize<In, FM_HIDDEN>;
  const Input input = Size::in(memory + kPickBytes);
  char* const rings = memory + kPickBytes + Size::kBytes;
  Choosing& choice = *(Choosing*)rings;
  choice.begin(from);
  fm_release_next();
  fm_wait_before();
  if (FM_EXPERTS) {
    choice.end(from, mine);
  } else {
    copy_picks(mine, *picks);
    fm_barrier();
  }
  Due due;
  if (FM_TURN) due.take(*from.late);
  if (FM_TURN == 2) {
    const int pick = threadIdx.x;
    if (pick < FM_K && due.has(pick)) from.put(mine, pick, from.table[mine.id[pick]]);
    fm_barrier();
  }
  PairStream stream(Ring(rings), mine, due);
  stream.start();
  // The last group has as few rows as any.
  if ((FM_EXPERTS || FM_TURN == 2) && blockIdx.x == gridDim.x - 1) copy_picks(*picks, mine);
  take_row<In, FM_HIDDEN>(input, Rows{x, q, s});
  fm_barrier();
  const Held<In, FM_HIDDEN> held(input);
  for (int set = stream.first(); set < stream.sets(); set += stream.stride()) {
    const int row = set % stream.kSets * InTiles::kRows;
    const auto gate = stream.products(held, row), up = stream.products(held, row);
    FM_UNROLL for (int deep = 0; deep < InTiles::kDeep; ++deep) {
      const int mine_row = row + InTiles::lane_row(deep);
      if (InTiles::writes() && mine_row < FM_WIDTH)
        inner[stream.pick(set) * FM_WIDTH + mine_row] = silu(gate.of[deep]) * up.of[deep];
    }
  }
}
