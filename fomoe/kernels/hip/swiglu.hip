// An expert that every token takes: silu(gate x) * (up x) [T][ROWS] of dense matrices gate and up.
#include "step.h"
#include "tile.h"
#if INT8
#include "tile_int8.h"
#else
#include "tile_float.h"
#endif
#include "tile_swiglu.h"

FM_KERNEL(THREADS) void swiglu(const fm_step* step, Bytes gate, Bytes up, Activations a, SwigluRows out) {
    FM_DYN_SHARED(unsigned char, shared);
    const int token = blockIdx.y * TILE_TOKENS, tokens = at_most(step->tokens - token, TILE_TOKENS);
    if (tokens <= 0) return;
    const int row = blockIdx.x * kHalfRows;
    const TileJob job = {gate, up, row, row, ROWS, nullptr, token, tokens};
    store_swiglu(compute_tile(job, a, shared), job, out);
}
