// What the two launches of the routed experts of one token share.
//
// Experts lie in slots as GGUF blocks; `Picks` says where: `picks` of fomoe/kernels/gpu/step.py.
// Defines: those of tiles.h, FM_HIDDEN, FM_WIDTH, FM_K experts; FM_PARTIAL: whether only the first of
// them may be computed here, those before the first without an address. FM_TURN: 0, or which of two
// launches of experts_in this is: 1 leaves out the late ones, 2 computes those alone.
#pragma once
#include "stream.h"

#ifndef FM_TURN
#define FM_TURN 0
#endif

struct Picks {
  unsigned long long address[3][FM_K];  // gate, up, down
  float weight[FM_K];
  int id[FM_K];
};

FM_DEV float silu(float x) { return x / (1.0f + fm_exp(-x)); }

FM_DEV void copy_picks(Picks& to, const Picks& from) {
  constexpr int kWords = sizeof(Picks) / 4;
  for (int i = threadIdx.x; i < kWords; i += kThreads) ((unsigned*)&to)[i] = ((const unsigned*)&from)[i];
}

// How many of the picks are computed here: a constant where it is all of them.
struct Computed {
  int some = 0;
  FM_DEV void take(const Picks& picks) {
    while (FM_PARTIAL && some < FM_K && picks.address[0][some]) ++some;
  }
  FM_DEV int count() const { return FM_PARTIAL ? some : FM_K; }
};

// Which of the picks are computed in this turn: bit i of `late` is the i-th pick.
struct Due {
  unsigned bits = 0;
  static_assert(FM_K <= 32, "a bit each");
  FM_DEV void take(unsigned late) { bits = (FM_TURN == 2 ? late : ~late) & (0xffffffffu >> (32 - FM_K)); }
  FM_DEV bool has(int pick) const { return bits >> pick & 1; }
  FM_DEV int count() const {
    int found = 0;
    FM_UNROLL for (int i = 0; i < FM_K; ++i) found += has(i);
    return found;
  }
  // The pick that is the `nth` of them.
  FM_DEV int pick(int nth) const {
    int at = 0;
    while (at < FM_K - 1 && (nth -= has(at)) >= 0) ++at;
    return at;
  }
};

FM_DEV constexpr int whole16(int bytes) { return ceil_div(bytes, 16) * 16; }
constexpr int kPickBytes = (sizeof(Picks) + 15) / 16 * 16;
