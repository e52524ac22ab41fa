// Into the experts of a prompt's tokens: silu(gate x) * (up x) of each pair (token, expert).
#include "step.h"
#include "tile.h"
#if INT8
#include "tile_int8.h"
#else
#include "tile_float.h"
#endif
#include "pair_tiles.h"
#include "tile_swiglu.h"

// ROWS is the experts' width F, COLS the hidden size; `addresses` [3][EXPERTS] of gate, up, down.
// Pairs of an expert without an address are passed over.
FM_KERNEL(THREADS) void experts_in(PairTiles pairs, const unsigned long long* addresses, Activations a, SwigluRows out) {
    FM_DYN_SHARED(unsigned char, shared);
    TileJob job;
    int expert;
    if (!find_tile(pairs, job, expert) || !addresses[expert]) return;
    job.matrix = at_address(addresses[expert]);
    job.up = at_address(addresses[EXPERTS + expert]);
    job.first = job.first_up = blockIdx.x * kHalfRows;
    job.token_of = pairs.token_of;
    store_swiglu(compute_tile(job, a, shared), job, out);
}
