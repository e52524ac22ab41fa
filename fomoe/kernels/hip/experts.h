// What the two launches of the routed experts of one token share.
//
// Experts lie in slots as GGUF blocks; `Picks` says where: `picks` of fomoe/kernels/gpu/step.py.
// Defines: those of tiles.h, FM_HIDDEN, FM_WIDTH, FM_K experts.
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

FM_DEV constexpr int whole16(int bytes) { return ceil_div(bytes, 16) * 16; }
constexpr int kPickBytes = (sizeof(Picks) + 15) / 16 * 16;
