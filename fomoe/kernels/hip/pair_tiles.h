// The experts of a prompt's tokens: pairs (token, expert) sorted by expert, in tiles of one expert
// each, as group_pairs.hip leaves them.
#pragma once

#include "tile.h"

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
