// A tile of a product with many tokens: TILE_ROWS rows of weights times TILE_TOKENS rows of
// activations, by one group of THREADS. Whatever computes it leaves float results [token][row] in
// shared memory, from where tile_store.h takes them.
//
// The tile's rows are two halves, which may come from two matrices (gate and up) and two types:
// TYPE and TYPE_UP. COLS values a row, a multiple of the block's and of 32.
#pragma once

#include "tile_blocks.h"

#ifndef TYPE_UP
#define TYPE_UP TYPE
#endif

constexpr int kHalfRows = TILE_ROWS / 2;
constexpr int kGroups = COLS / 32;  // of 32 values in a row
constexpr int kOutStride = TILE_ROWS + 4;
constexpr int kOutBytes = TILE_TOKENS * kOutStride * 4;
static_assert(COLS % 32 == 0 && COLS % kBlockValues<TYPE> == 0 && COLS % kBlockValues<TYPE_UP> == 0, "whole blocks");

// Rows of activations: int8 and (scale, scale * sum) per 32 of them, or float32.
struct Activations {
    const signed char* q;
    const fm_f2* s;
    const float* x;
};

struct TileJob {
    Bytes matrix, up;     // of the two halves
    int first, first_up;  // the halves' first rows
    int rows;             // of either matrix
    const int* token_of;  // the activations' row of each pair; null: the pair itself
    int pair, pairs;      // the tile's first pair, and how many: 1 .. TILE_TOKENS
};

FM_DEV int at_most(int value, int most) { return value < most ? value : most; }

// Rows beyond the matrix are its last one: computed, never stored.
template <int T>
FM_DEV Bytes weight_row(const TileJob& job, int row) {
    constexpr long long kRowBytes = COLS / kBlockValues<T> * kBlockBytes<T>;
    const bool is_up = row >= kHalfRows;
    const int r = is_up ? job.first_up + row - kHalfRows : job.first + row;
    return (is_up ? job.up : job.matrix) + at_most(r, job.rows - 1) * kRowBytes;
}

FM_DEV void find_rows(const TileJob& job, int* row_of) {
    for (int i = fm_thread(); i < TILE_TOKENS; i += THREADS) {
        const int pair = job.pair + at_most(i, job.pairs - 1);
        row_of[i] = job.token_of ? job.token_of[pair] : pair;
    }
}
