// Tiles in float32: any weights, restored to float32, times float32 activations. A thread computes
// MICRO x MICRO results; 32 columns at a time, each sum in ascending order of the columns.
#pragma once

#include "tile.h"

constexpr int kThreadsDown = TILE_ROWS / MICRO;
static_assert(TILE_ROWS * TILE_TOKENS == THREADS * MICRO * MICRO && MICRO % 2 == 0, "a thread's share");
constexpr int kRowStride = TILE_ROWS + 4, kTokenStride = TILE_TOKENS + 4;  // of a column
constexpr int kUsedBytes = 32 * (kRowStride + kTokenStride) * 4;
constexpr int kSharedBytes = (kUsedBytes > kOutBytes ? kUsedBytes : kOutBytes) + TILE_TOKENS * 4;
static_assert(kSharedBytes <= SHARED_BYTES, "the launch asks for too little shared memory");
constexpr int kRowFours = (TILE_ROWS * 8 + THREADS - 1) / THREADS;  // per thread and step
constexpr int kTokenFours = (TILE_TOKENS * 8 + THREADS - 1) / THREADS;

template <int T>
FM_DEV fm_f4 restored(const Values32& v, int four) {
    float value[4];
    const bool upper = four >= 4;
    const float scale = kHasHalves<T> && upper ? v.scale.y : v.scale.x;
    unsigned word = 0;
    FM_UNROLL
    for (int i = 0; i < 8; i++) word = i == four ? v.q[i] : word;
    FM_UNROLL
    for (int i = 0; i < 4; i++) {
        const float q = float((signed char)(word >> (8 * i) & 255));
        value[i] = kHasMinima<T> ? fm_fma(scale, q, v.scale.y) : scale * q;
    }
    return fm_f4{value[0], value[1], value[2], value[3]};
}

// The four weights from column 32 * group + 4 * four of a row.
template <int T>
FM_DEV fm_f4 four_weights(Bytes row, int group, int four) {
    if constexpr (T == kF32) {
        return reinterpret_cast<const fm_f4*>(row)[8 * group + four];
    } else if constexpr (kIsFloat<T>) {
        const fm_u2 two = reinterpret_cast<const fm_u2*>(row)[8 * group + four];
        if constexpr (T == kF16)
            return fm_f4{fm_h2f(two.x & 0xffff), fm_h2f(two.x >> 16), fm_h2f(two.y & 0xffff), fm_h2f(two.y >> 16)};
        else
            return fm_f4{fm_bf2f(two.x & 0xffff), fm_bf2f(two.x >> 16), fm_bf2f(two.y & 0xffff), fm_bf2f(two.y >> 16)};
    } else if constexpr (kBlockValues<T> == 32) {
        return restored<T>(unpack(Kind<T>(), row, group), four);
    } else {
        return restored<T>(unpack(Kind<T>(), row + group / 8 * kBlockBytes<T>, group % 8), four);
    }
}

// What a thread brings of a step's weights and activations.
struct Brought {
    fm_f4 weights[kRowFours], tokens[kTokenFours];
};

FM_DEV void bring(const TileJob& job, const float* x, const int* row_of, int group, Brought& to) {
    FM_UNROLL
    for (int j = 0; j < kRowFours; j++) {
        const int i = fm_thread() + j * THREADS, row = at_most(i / 8, TILE_ROWS - 1);
        to.weights[j] = TYPE == TYPE_UP || row < kHalfRows
                            ? four_weights<TYPE>(weight_row<TYPE>(job, row), group, i % 8)
                            : four_weights<TYPE_UP>(weight_row<TYPE_UP>(job, row), group, i % 8);
    }
    FM_UNROLL
    for (int j = 0; j < kTokenFours; j++) {
        const int i = fm_thread() + j * THREADS, token = at_most(i / 8, TILE_TOKENS - 1);
        const fm_f4* const row = reinterpret_cast<const fm_f4*>(x + (long long)row_of[token] * COLS);
        to.tokens[j] = row[8 * group + i % 8];
    }
}

FM_DEV void put_four(float* column, int stride, const fm_f4& v) {
    column[0] = v.x, column[stride] = v.y, column[2 * stride] = v.z, column[3 * stride] = v.w;
}

FM_DEV void put(const Brought& from, float* weights, float* tokens) {
    FM_UNROLL
    for (int j = 0; j < kRowFours; j++) {
        const int i = fm_thread() + j * THREADS;
        if (i < TILE_ROWS * 8) put_four(weights + i % 8 * 4 * kRowStride + i / 8, kRowStride, from.weights[j]);
    }
    FM_UNROLL
    for (int j = 0; j < kTokenFours; j++) {
        const int i = fm_thread() + j * THREADS;
        if (i < TILE_TOKENS * 8) put_four(tokens + i % 8 * 4 * kTokenStride + i / 8, kTokenStride, from.tokens[j]);
    }
}

FM_DEV void load_share(const float* from, float* to) {
    FM_UNROLL
    for (int i = 0; i < MICRO; i += 2) {
        const fm_f2 two = *reinterpret_cast<const fm_f2*>(from + i);
        to[i] = two.x, to[i + 1] = two.y;
    }
}

struct Sums {
    float at[MICRO][MICRO];  // [token][row]
};
FM_DEV int thread_row() { return fm_thread() % kThreadsDown * MICRO; }
FM_DEV int thread_token() { return fm_thread() / kThreadsDown * MICRO; }

FM_DEV void add_columns(const float* weights, const float* tokens, Sums& sums) {
    FM_UNROLL
    for (int k = 0; k < 32; k++) {
        float w[MICRO], x[MICRO];
        load_share(weights + k * kRowStride + thread_row(), w);
        load_share(tokens + k * kTokenStride + thread_token(), x);
        FM_UNROLL
        for (int t = 0; t < MICRO; t++)
            FM_UNROLL
            for (int r = 0; r < MICRO; r++) sums.at[t][r] = fm_fma(w[r], x[t], sums.at[t][r]);
    }
}

// Leaves the tile's results [token][row] at the start of shared memory, seen by all.
FM_DEV float* compute_tile(const TileJob& job, const Activations& a, unsigned char* shared) {
    float* const weights = reinterpret_cast<float*>(shared);
    float* const tokens = weights + 32 * kRowStride;
    int* const row_of = reinterpret_cast<int*>(shared + kSharedBytes - TILE_TOKENS * 4);
    find_rows(job, row_of);
    fm_barrier();
    Brought brought;
    Sums sums = {};
    bring(job, a.x, row_of, 0, brought);
    for (int group = 0; group < kGroups; group++) {
        put(brought, weights, tokens);
        fm_barrier();
        if (group + 1 < kGroups) bring(job, a.x, row_of, group + 1, brought);
        add_columns(weights, tokens, sums);
        fm_barrier();
    }
    FM_UNROLL
    for (int t = 0; t < MICRO; t++)
        FM_UNROLL
        for (int r = 0; r < MICRO; r++) weights[(thread_token() + t) * kOutStride + thread_row() + r] = sums.at[t][r];
    fm_barrier();
    return weights;
}
