// Where the results of a tile go; `tile` is [TILE_TOKENS][kOutStride] float32 in shared memory.
#pragma once

#include "tile.h"

// Rows `first`.. of out float32 [pairs][rows], stored or (ADD) added.
FM_DEV void store_rows(const float* tile, const TileJob& job, float* out) {
    for (int i = fm_thread(); i < TILE_TOKENS * TILE_ROWS; i += THREADS) {
        const int token = i / TILE_ROWS, row = job.first + i % TILE_ROWS;
        if (token >= job.pairs || row >= job.rows) continue;
        float* const at = out + (long long)(job.pair + token) * job.rows + row;
        const float value = tile[token * kOutStride + i % TILE_ROWS];
#if ADD
        *at += value;
#else
        *at = value;
#endif
    }
}
