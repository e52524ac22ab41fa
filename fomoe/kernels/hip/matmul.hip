// Dense products with many tokens: out [T][ROWS] = (ADD: +=) activations [T][COLS] times a matrix.
// INT8: quantised weights on matrix cores (tile_int8.h); else float32 (tile_float.h).
#include "step.h"
#include "tile.h"
#if INT8
#include "tile_int8.h"
#else
#include "tile_float.h"
#endif
#include "tile_store.h"

FM_KERNEL(THREADS) void matmul(const fm_step* step, Bytes matrix, Activations a, float* out) {
    FM_DYN_SHARED(unsigned char, shared);
    const int token = blockIdx.y * TILE_TOKENS, tokens = at_most(step->tokens - token, TILE_TOKENS);
    if (tokens <= 0) return;
    const int row = blockIdx.x * TILE_ROWS;
    const TileJob job = {matrix, matrix, row, row + kHalfRows, ROWS, nullptr, token, tokens};
    store_rows(compute_tile(job, a, shared), job, out);
}
