// Dense products with many tokens: out [T][ROWS] = (ADD: +=) activations [T][COLS] times a matrix,
// for PARTS matrices of one shape.
// INT8: quantised weights on matrix cores (tile_int8.h); else float32 (tile_float.h).
#include "step.h"
#include "tile.h"
#if INT8
#include "tile_int8.h"
#else
#include "tile_float.h"
#endif
#include "tile_store.h"

struct Parts {
    Bytes matrix[PARTS];
    float* out[PARTS];
};

// The pointer of the group's part, as the first one and a distance: an index or a choice between
// them would put the struct on the stack, a number would hide that it points to device memory.
template <class T>
FM_DEV T* of_group(T* const (&pointers)[PARTS]) {
    long long distance = 0;
    FM_UNROLL
    for (int part = 1; part < PARTS; part++)
        distance |= (pointers[part] - pointers[0]) & -(long long)(int(blockIdx.z) == part);
    return pointers[0] + distance;
}

FM_KERNEL(THREADS) void matmul(const fm_step* step, Parts parts, Activations a) {
    FM_DYN_SHARED(unsigned char, shared);
    const int token = blockIdx.y * TILE_TOKENS, tokens = at_most(step->tokens - token, TILE_TOKENS);
    if (tokens <= 0) return;
    const int row = blockIdx.x * TILE_ROWS;
    const Bytes matrix = of_group(parts.matrix);
    const TileJob job = {matrix, matrix, row, row + kHalfRows, ROWS, nullptr, token, tokens};
    store_rows(compute_tile(job, a, shared), job, of_group(parts.out));
}
