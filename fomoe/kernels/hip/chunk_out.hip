// Out of the experts of a prompt's tokens: down times the rows of each pair (token, expert).
#include "step.h"
#include "tile.h"
#if INT8
#include "tile_int8.h"
#else
#include "tile_float.h"
#endif
#include "pair_tiles.h"
#include "tile_store.h"

// ROWS is the hidden size, COLS the experts' width. Writes out [pairs][ROWS], not yet weighted.
FM_KERNEL(THREADS) void experts_out(PairTiles pairs, const unsigned long long* addresses, Activations a, float* out) {
    FM_DYN_SHARED(unsigned char, shared);
    TileJob job;
    int expert;
    if (!find_tile(pairs, job, expert) || !addresses[expert]) return;
    job.matrix = job.up = at_address(addresses[2 * EXPERTS + expert]);
    job.first = blockIdx.x * TILE_ROWS;
    job.first_up = job.first + kHalfRows;
    job.token_of = nullptr;
    store_rows(compute_tile(job, a, shared), job, out);
}
