// What the two launches of the routed experts of one token share.
//
// Experts lie in slots as GGUF blocks; `Picks` says where: `picks` of fomoe/kernels/gpu/step.py.
// Defines: those of tiles.h, FM_HIDDEN, FM_WIDTH, FM_K experts; FM_PARTIAL: whether only the first of
// them may be computed here, those before the first without an address.
#pragma once
#include "stream.h"

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

FM_DEV constexpr int whole16(int bytes) { return ceil_div(bytes, 16) * 16; }
constexpr int kPickBytes = (sizeof(Picks) + 15) / 16 * 16;
