// The experts of a prompt's tokens: pairs (token, expert) sorted by expert, tiles of one expert each
// (group_pairs.hip); gate and up with SiLU, then down, then the weighted sums per token.
#include "step.h"
#include "tile.h"
#if INT8
#include "tile_int8.h"
#else
#include "tile_float.h"
#endif
#include "tile_store.h"
#include "tile_swiglu.h"

// Tiles (expert, first pair) and the pairs of each expert, `starts` [experts + 1].
struct PairTiles {
    const unsigned* count;
    const fm_u2* tiles;
    const int* starts;
    const int* token_of;  // of each pair
};

// False where this group has no tile.
FM_DEV bool find_tile(const PairTiles& pairs, TileJob& job, int& expert) {
    if (blockIdx.y >= *pairs.count) return false;
    const fm_u2 tile = pairs.tiles[blockIdx.y];
    expert = int(tile.x);
    job.pair = int(tile.y);
    job.pairs = at_most(pairs.starts[expert + 1] - job.pair, TILE_TOKENS);
    job.rows = ROWS;
    return true;
}

FM_DEV Bytes at_address(unsigned long long address) { return reinterpret_cast<Bytes>(address); }

// ROWS is the experts' width F, COLS the hidden size; `addresses` [3][EXPERTS] of gate, up, down.
// Writes silu(gate x) * (up x) of each pair.
FM_KERNEL(THREADS) void experts_in(PairTiles pairs, const unsigned long long* addresses, Activations a, SwigluRows out) {
    FM_DYN_SHARED(unsigned char, shared);
    TileJob job;
    int expert;
    if (!find_tile(pairs, job, expert)) return;
    job.matrix = at_address(addresses[expert]);
    job.up = at_address(addresses[EXPERTS + expert]);
    job.first = job.first_up = blockIdx.x * kHalfRows;
    job.token_of = pairs.token_of;
    store_swiglu(compute_tile(job, a, shared), job, out);
}

// ROWS is the hidden size, COLS the experts' width. Writes out [pairs][ROWS], not yet weighted.
FM_KERNEL(THREADS) void experts_out(PairTiles pairs, const unsigned long long* addresses, Activations a, float* out) {
    FM_DYN_SHARED(unsigned char, shared);
    TileJob job;
    int expert;
    if (!find_tile(pairs, job, expert)) return;
    job.matrix = job.up = at_address(addresses[2 * EXPERTS + expert]);
    job.first = blockIdx.x * TILE_ROWS;
    job.first_up = job.first + kHalfRows;
    job.token_of = nullptr;
    store_rows(compute_tile(job, a, shared), job, out);
}
