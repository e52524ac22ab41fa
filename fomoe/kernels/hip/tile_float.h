// Tiles in float32: any weights, restored to float32, times float32 activations.
//
// STEP columns at a time come into shared memory. A slice of the group's threads takes a part of
// them, MICRO_ROWS x MICRO_TOKENS results a thread; at the end the slices' sums are added in
// ascending order, so that bits depend on nothing but the tile's shape.
#pragma once

#include "tile.h"

constexpr int kDown = TILE_ROWS / MICRO_ROWS, kAcross = TILE_TOKENS / MICRO_TOKENS;  // threads of a slice
constexpr int kSlices = THREADS / (kDown * kAcross), kSliceColumns = STEP / kSlices;
static_assert(kDown * kAcross * kSlices == THREADS && kSliceColumns * kSlices == STEP, "equal shares");
static_assert(MICRO_ROWS % 4 == 0 && MICRO_TOKENS % 4 == 0 && STEP % 32 == 0, "shares of whole fours");
constexpr int kSteps = (COLS + STEP - 1) / STEP;

constexpr int kRowStride = TILE_ROWS + 4, kTokenStride = TILE_TOKENS + 4;  // of a column
constexpr int kUsedBytes = STEP * (kRowStride + kTokenStride) * 4;
constexpr int kSharedBytes = (kUsedBytes > kOutBytes ? kUsedBytes : kOutBytes) + TILE_TOKENS * 4;
static_assert(kSharedBytes <= SHARED_BYTES, "the launch asks for too little shared memory");

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

// ---- how threads bring a step: eight neighbours take the eight fours of 32 columns of a line (a row
// of weights or of activations), the next eight those of the next line.
template <int LINES>
constexpr int kTurns = LINES * STEP / 4 / THREADS;

template <int LINES>
struct Share {
    static_assert(kTurns<LINES> * THREADS * 4 == LINES * STEP, "every thread brings as much");
    int line, group, four;
    FM_DEV explicit Share(int turn) {
        const int i = fm_thread() + turn * THREADS;
        four = i % 8, line = i / 8 % LINES, group = i / 8 / LINES;
    }
};

// Where the lines begin that a thread brings fours of.
struct Sources {
    Bytes weights[kTurns<TILE_ROWS>];
    const fm_f4* tokens[kTurns<TILE_TOKENS>];
};
// What it brings of a step's weights and activations.
struct Brought {
    fm_f4 weights[kTurns<TILE_ROWS>], tokens[kTurns<TILE_TOKENS>];
};

FM_DEV Sources sources_of(const TileJob& job, const float* x, const int* row_of) {
    Sources from;
    FM_UNROLL
    for (int turn = 0; turn < kTurns<TILE_ROWS>; turn++) {
        const int row = Share<TILE_ROWS>(turn).line;
        from.weights[turn] = TYPE == TYPE_UP || row < kHalfRows ? weight_row<TYPE>(job, row) : weight_row<TYPE_UP>(job, row);
    }
    FM_UNROLL
    for (int turn = 0; turn < kTurns<TILE_TOKENS>; turn++) {
        const int token = Share<TILE_TOKENS>(turn).line;
        from.tokens[turn] = reinterpret_cast<const fm_f4*>(x + (long long)row_of[token] * COLS);
    }
    return from;
}

// Zeros beyond the last column.
FM_DEV void bring(const Sources& from, int step, Brought& to) {
    const int first = step * (STEP / 32);
    FM_UNROLL
    for (int turn = 0; turn < kTurns<TILE_ROWS>; turn++) {
        const Share<TILE_ROWS> at(turn);
        to.weights[turn] = fm_f4{0.0f, 0.0f, 0.0f, 0.0f};
        if (COLS % STEP != 0 && first + at.group >= kGroups) continue;
        to.weights[turn] = TYPE == TYPE_UP || at.line < kHalfRows
                               ? four_weights<TYPE>(from.weights[turn], first + at.group, at.four)
                               : four_weights<TYPE_UP>(from.weights[turn], first + at.group, at.four);
    }
    FM_UNROLL
    for (int turn = 0; turn < kTurns<TILE_TOKENS>; turn++) {
        const Share<TILE_TOKENS> at(turn);
        to.tokens[turn] = fm_f4{0.0f, 0.0f, 0.0f, 0.0f};
        if (COLS % STEP != 0 && first + at.group >= kGroups) continue;
        to.tokens[turn] = from.tokens[turn][8 * (first + at.group) + at.four];
    }
}

// Column 4 * four + i of 32 lies at 8 * i + four: the lanes of a wave write to different banks.
template <int LINES>
FM_DEV void put_fours(const fm_f4* fours, float* to) {
    constexpr int kStride = LINES + 4;
    FM_UNROLL
    for (int turn = 0; turn < kTurns<LINES>; turn++) {
        const Share<LINES> at(turn);
        float* const column = to + (32 * at.group + at.four) * kStride + at.line;
        const fm_f4 v = fours[turn];
        column[0] = v.x, column[8 * kStride] = v.y, column[16 * kStride] = v.z, column[24 * kStride] = v.w;
    }
}

// ---- sums; a thread's lines are fours, LINES / (MICRO / 4) from one to the next
struct Sums {
    float at[MICRO_TOKENS][MICRO_ROWS];
};
FM_DEV int slice() { return fm_thread() / (kDown * kAcross); }
FM_DEV int thread_row(int four) { return fm_thread() % kDown * 4 + four * (4 * kDown); }
FM_DEV int thread_token(int four) { return fm_thread() / kDown % kAcross * 4 + four * (4 * kAcross); }

FM_DEV void load_four(const float* from, float* to) {
    const fm_f4 v = *reinterpret_cast<const fm_f4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

FM_DEV void add_columns(const float* weights, const float* tokens, Sums& sums) {
#pragma unroll 4
    for (int k = slice() * kSliceColumns; k < (slice() + 1) * kSliceColumns; k++) {
        float w[MICRO_ROWS], x[MICRO_TOKENS];
        FM_UNROLL
        for (int i = 0; i < MICRO_ROWS / 4; i++) load_four(weights + k * kRowStride + thread_row(i), w + 4 * i);
        FM_UNROLL
        for (int i = 0; i < MICRO_TOKENS / 4; i++) load_four(tokens + k * kTokenStride + thread_token(i), x + 4 * i);
        FM_UNROLL
        for (int t = 0; t < MICRO_TOKENS; t++)
            FM_UNROLL
            for (int r = 0; r < MICRO_ROWS; r++) sums.at[t][r] = fm_fma(w[r], x[t], sums.at[t][r]);
    }
}

// Adds (the first slice stores) a thread's sums to the results.
FM_DEV void add_sums(const Sums& sums, float* out) {
    FM_UNROLL
    for (int t = 0; t < MICRO_TOKENS; t++) {
        FM_UNROLL
        for (int r = 0; r < MICRO_ROWS; r++) {
            float* const at = out + (thread_token(t / 4) + t % 4) * kOutStride + thread_row(r / 4) + r % 4;
            *at = slice() == 0 ? sums.at[t][r] : *at + sums.at[t][r];
        }
    }
}

// Leaves the tile's results [token][row] at the start of shared memory, seen by all.
FM_DEV float* compute_tile(const TileJob& job, const Activations& a, unsigned char* shared) {
    float* const weights = reinterpret_cast<float*>(shared);
    float* const tokens = weights + STEP * kRowStride;
    int* const row_of = reinterpret_cast<int*>(shared + kSharedBytes - TILE_TOKENS * 4);
    find_rows(job, row_of);
    fm_barrier();
    const Sources from = sources_of(job, a.x, row_of);
    Brought brought;
    Sums sums = {};
    bring(from, 0, brought);
    for (int step = 0; step < kSteps; step++) {
        put_fours<TILE_ROWS>(brought.weights, weights);
        put_fours<TILE_TOKENS>(brought.tokens, tokens);
        fm_barrier();
        if (step + 1 < kSteps) bring(from, step + 1, brought);
        add_columns(weights, tokens, sums);
        fm_barrier();
    }
    for (int turn = 0; turn < kSlices; turn++) {
        if (turn == slice()) add_sums(sums, weights);
        fm_barrier();
    }
    return weights;
}
