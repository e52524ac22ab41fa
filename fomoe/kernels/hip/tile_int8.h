// Tiles on matrix cores: int8 weights times int8 activations, 32 values at a time, each sum scaled
// into float32 accumulators in ascending order of the columns, whatever the shape of the tile.
//
// A step takes 256 columns: raw blocks and activations come by asynchronous copies TILE_STAGES
// steps deep, blocks are unpacked once for all tokens of the tile, PART columns at a time.
#pragma once

#include "tile.h"

constexpr int kStep = 256, kSteps = (kGroups + 7) / 8;
constexpr int kWaves = THREADS / FM_WAVE;
constexpr int kPartGroups = PART / 32;
static_assert(TILE_ROWS % 32 == 0 && TILE_TOKENS % 16 == 0 && 256 % PART == 0 && PART % 32 == 0, "a tile's shape");

// ---- which tiles of 16 x 16 a wave computes: the most square share. With ALONG waves side by side
// along the tokens, the edges of a share are kEdges tiles.
template <int ALONG, int DOWN = kWaves / ALONG>
constexpr int kEdges = TILE_ROWS / 16 % DOWN || TILE_TOKENS / 16 % ALONG ? 1 << 20 : TILE_ROWS / 16 / DOWN + TILE_TOKENS / 16 / ALONG;
template <int MOST>
constexpr int kBest = kEdges<MOST> < kEdges<kBest<MOST / 2>> ? MOST : kBest<MOST / 2>;
template <>
constexpr int kBest<1> = 1;
constexpr int kTokenWaves = kBest<kWaves>;
static_assert(kEdges<kTokenWaves> < 1 << 20, "waves that share the tile evenly");
constexpr int kRowWaves = kWaves / kTokenWaves;
constexpr int kRowTiles = TILE_ROWS / 16 / kRowWaves, kTokenTiles = TILE_TOKENS / 16 / kTokenWaves;
static_assert(TYPE == TYPE_UP || kRowWaves % 2 == 0, "a wave's rows are of one type");

// ---- raw blocks in shared memory: the 16-byte words that hold a row's blocks of a step
template <int T>
struct Raw {
    static constexpr int kRowBytes = COLS / kBlockValues<T> * kBlockBytes<T>;
    static constexpr int kStepBytes = kStep / kBlockValues<T> * kBlockBytes<T>;
    static constexpr bool kAligned = kRowBytes % 16 == 0 && kStepBytes % 16 == 0;
    static constexpr int kWords = kAligned ? kStepBytes / 16 : (kStepBytes + 14 + 15) / 16;
};
constexpr int kRawWords = Raw<TYPE>::kWords > Raw<TYPE_UP>::kWords ? Raw<TYPE>::kWords : Raw<TYPE_UP>::kWords;

// ---- shared memory; strides keep lanes that read together on different banks
constexpr int kWeightStride = PART + 16, kScaleStride = TILE_ROWS + 2;
constexpr int kRawStride = 16 * kRawWords, kTokenStride = kStep + 16, kTokenScaleStride = 10;
constexpr int kRawBytes = TILE_ROWS * kRawStride;
constexpr int kStageBytes = kRawBytes + TILE_TOKENS * (kTokenStride + 8 * kTokenScaleStride);
constexpr int kWeightBytes = TILE_ROWS * kWeightStride, kScaleBytes = kPartGroups * kScaleStride * 8;
constexpr int kRowOfBytes = TILE_TOKENS * 4;
constexpr int kUsedBytes = TILE_STAGES * kStageBytes + kWeightBytes + kScaleBytes;
constexpr int kSharedBytes = (kUsedBytes > kOutBytes ? kUsedBytes : kOutBytes) + kRowOfBytes;
static_assert(kSharedBytes <= SHARED_BYTES, "the launch asks for too little shared memory");

struct Stage {
    unsigned char* raw;
    signed char* q;  // [TILE_TOKENS][kTokenStride]
    fm_f2* s;        // [TILE_TOKENS][kTokenScaleStride]
};
FM_DEV Stage stage_of(unsigned char* shared, int step) {
    unsigned char* const raw = shared + step % TILE_STAGES * kStageBytes;
    signed char* const q = reinterpret_cast<signed char*>(raw + kRawBytes);
    return Stage{raw, q, reinterpret_cast<fm_f2*>(q + TILE_TOKENS * kTokenStride)};
}

// Unpacked weights int8 [TILE_ROWS][kWeightStride] and their scales [group][kScaleStride].
struct Unpacked {
    signed char* q;
    fm_f2* scale;
};
FM_DEV Unpacked unpacked_of(unsigned char* shared) {
    unsigned char* const q = shared + TILE_STAGES * kStageBytes;
    return Unpacked{reinterpret_cast<signed char*>(q), reinterpret_cast<fm_f2*>(q + kWeightBytes)};
}
FM_DEV int* row_of_in(unsigned char* shared) {
    return reinterpret_cast<int*>(shared + kSharedBytes - kRowOfBytes);
}

// ---- copies
template <int T>
FM_DEV void copy_weights(const TileJob& job, const Stage& to, int step, int begin, int end) {
    for (int i = begin * Raw<T>::kWords + fm_thread(); i < end * Raw<T>::kWords; i += THREADS) {
        const int row = i / Raw<T>::kWords, word = i % Raw<T>::kWords;
        const Bytes start = weight_row<T>(job, row), stop = start + Raw<T>::kRowBytes;
        const Bytes first = start + step * Raw<T>::kStepBytes;
        const unsigned before = Raw<T>::kAligned ? 0 : unsigned(reinterpret_cast<unsigned long long>(first)) & 15;
        const Bytes from = first - before + 16 * word;
        if (from < stop) fm_copy16(to.raw + row * kRawStride + 16 * word, from);
    }
}

FM_DEV void copy_tokens(const Activations& a, const int* row_of, const Stage& to, int step) {
    for (int i = fm_thread(); i < TILE_TOKENS * 16; i += THREADS) {
        const int token = i / 16, column = step * kStep + i % 16 * 16;
        if (COLS % kStep == 0 || column < COLS)
            fm_copy16(to.q + token * kTokenStride + i % 16 * 16, a.q + (long long)row_of[token] * COLS + column);
    }
    for (int i = fm_thread(); i < TILE_TOKENS * 4; i += THREADS) {
        const int token = i / 4, pair = i % 4, group = step * 8 + pair * 2;
        const fm_f2* const from = a.s + (long long)row_of[token] * kGroups + group;
        fm_f2* const at = to.s + token * kTokenScaleStride + pair * 2;
        if constexpr (kGroups % 2 == 0) {
            if (group < kGroups) fm_copy16(at, from);
        } else {
            if (group < kGroups) at[0] = from[0];
            if (group + 1 < kGroups) at[1] = from[1];
        }
    }
}

FM_DEV void copy_step(const TileJob& job, const Activations& a, const int* row_of, unsigned char* shared, int step) {
    if (step < kSteps) {
        const Stage to = stage_of(shared, step);
        if constexpr (TYPE == TYPE_UP) {
            copy_weights<TYPE>(job, to, step, 0, TILE_ROWS);
        } else {
            copy_weights<TYPE>(job, to, step, 0, kHalfRows);
            copy_weights<TYPE_UP>(job, to, step, kHalfRows, TILE_ROWS);
        }
        copy_tokens(a, row_of, to, step);
    }
    fm_copy_commit();  // of nothing after the last step, so that waits count alike
}

// ---- raw blocks to int8
template <int T>
FM_DEV void unpack_rows(const TileJob& job, const Stage& from, const Unpacked& to, int group0, int begin, int end) {
#pragma unroll 2
    for (int i = begin * kPartGroups + fm_thread(); i < end * kPartGroups; i += THREADS) {
        const int row = i / kPartGroups, group = i % kPartGroups;
        if (COLS % kStep != 0 && group0 + group >= kGroups) continue;
        Bytes blocks = from.raw + row * kRawStride;
        if constexpr (!Raw<T>::kAligned) {
            const Bytes first = weight_row<T>(job, row) + group0 / 8 * Raw<T>::kStepBytes;
            blocks += unsigned(reinterpret_cast<unsigned long long>(first)) & 15;
        }
        const Values32 v = unpack(Kind<T>(), blocks, group0 % 8 + group);
        fm_u4* const q = reinterpret_cast<fm_u4*>(to.q + row * kWeightStride + 32 * group);
        q[0] = fm_u4{v.q[0], v.q[1], v.q[2], v.q[3]};
        q[1] = fm_u4{v.q[4], v.q[5], v.q[6], v.q[7]};
        to.scale[group * kScaleStride + row] = v.scale;
    }
}

FM_DEV void unpack_part(const TileJob& job, const Stage& from, const Unpacked& to, int group0) {
    if constexpr (TYPE == TYPE_UP) {
        unpack_rows<TYPE>(job, from, to, group0, 0, TILE_ROWS);
    } else {
        unpack_rows<TYPE>(job, from, to, group0, 0, kHalfRows);
        unpack_rows<TYPE_UP>(job, from, to, group0, kHalfRows, TILE_ROWS);
    }
}

// ---- sums
struct Sums {
    float at[kRowTiles][kTokenTiles][FM_TILE_REGS];
};
FM_DEV int wave_row() { return fm_thread() / FM_WAVE % kRowWaves * (16 * kRowTiles); }
FM_DEV int wave_token() { return fm_thread() / FM_WAVE / kRowWaves * (16 * kTokenTiles); }

// An integer sum stays below 2^22 in size, so that added to the bits of 1.5 * 2^23 it makes the
// float of that much more: one subtraction instead of a conversion, which runs at a lower rate.
constexpr int kFloatBits = 0x4b400000;
constexpr float kFloatBase = 12582912.0f;

FM_DEV fm_tile_c tile_base() {
    fm_tile_c c = fm_tile_zero();
    FM_UNROLL
    for (int i = 0; i < FM_TILE_REGS; i++) c[i] = kFloatBits;
    return c;
}
FM_DEV float tile_value(const fm_tile_c& c, int i) { return fm_bits<float>(c[i]) - kFloatBase; }

// Adds the products of one group of 32 columns: w of a 16 x 32 tile's rows, x of its tokens.
template <int HALF>
FM_DEV void add_half(float* sums, const fm_tile_a& a, const fm_tile_b& b, const fm_f2* w, const fm_f2* x) {
    fm_tile_c c = tile_base();
    fm_tile_mma_half<HALF>(c, a, b);
    FM_UNROLL
    for (int i = 0; i < FM_TILE_REGS; i++)
        sums[i] = fm_fma((HALF ? w[i].y : w[i].x) * x[i].x, tile_value(c, i), sums[i]);
}

template <int T>
FM_DEV void add_tile(float* sums, const fm_tile_a& a, const fm_tile_b& b, const fm_f2* w, const fm_f2* x) {
    if constexpr (kHasHalves<T>) {
        add_half<0>(sums, a, b, w, x);
        add_half<1>(sums, a, b, w, x);
    } else {
        fm_tile_c c = tile_base();
        fm_tile_mma(c, a, b);
        FM_UNROLL
        for (int i = 0; i < FM_TILE_REGS; i++) {
            sums[i] = fm_fma(w[i].x * x[i].x, tile_value(c, i), sums[i]);
            if constexpr (kHasMinima<T>) sums[i] = fm_fma(w[i].y, x[i].y, sums[i]);
        }
    }
}

template <int T>
FM_DEV void add_group(const Stage& x, const Unpacked& w, int group, int step_group, Sums& sums) {
    fm_tile_a a[kRowTiles];
    fm_f2 row_scale[kRowTiles][FM_TILE_REGS], token_scale[FM_TILE_REGS];
    FM_UNROLL
    for (int r = 0; r < kRowTiles; r++) {
        const int row = wave_row() + 16 * r;
        a[r] = fm_tile_load_a(w.q + row * kWeightStride + 32 * group, kWeightStride);
        FM_UNROLL
        for (int i = 0; i < FM_TILE_REGS; i++) row_scale[r][i] = w.scale[group * kScaleStride + row + fm_tile_row(i)];
    }
    FM_UNROLL
    for (int t = 0; t < kTokenTiles; t++) {
        const int token = wave_token() + 16 * t;
        const fm_tile_b b = fm_tile_load_b(x.q + token * kTokenStride + 32 * step_group, kTokenStride);
        FM_UNROLL
        for (int i = 0; i < FM_TILE_REGS; i++)
            token_scale[i] = x.s[(token + fm_tile_col(i)) * kTokenScaleStride + step_group];
        FM_UNROLL
        for (int r = 0; r < kRowTiles; r++) add_tile<T>(sums.at[r][t], a[r], b, row_scale[r], token_scale);
    }
}

template <int T>
FM_DEV void add_part(const Stage& x, const Unpacked& w, int group0, Sums& sums) {
#pragma unroll 1  // more of them at once take more registers than there are
    for (int group = 0; group < kPartGroups; group++)
        if (COLS % kStep == 0 || group0 + group < kGroups) add_group<T>(x, w, group, group0 % 8 + group, sums);
}

FM_DEV void store_sums(const Sums& sums, float* out) {
    FM_UNROLL
    for (int r = 0; r < kRowTiles; r++)
        FM_UNROLL
        for (int t = 0; t < kTokenTiles; t++)
            FM_UNROLL
            for (int i = 0; i < FM_TILE_REGS; i++)
                out[(wave_token() + 16 * t + fm_tile_col(i)) * kOutStride + wave_row() + 16 * r + fm_tile_row(i)] =
                    sums.at[r][t][i];
}

// ---- the tile
FM_DEV void compute_step(const TileJob& job, unsigned char* shared, int step, Sums& sums) {
    const Stage stage = stage_of(shared, step);
    const Unpacked weights = unpacked_of(shared);
    for (int group0 = 8 * step; group0 < at_most(8 * step + 8, kGroups); group0 += kPartGroups) {
        if (group0 % 8) fm_barrier();  // all have taken the part before
        unpack_part(job, stage, weights, group0);
        fm_barrier();
        if (TYPE == TYPE_UP || wave_row() < kHalfRows)
            add_part<TYPE>(stage, weights, group0, sums);
        else
            add_part<TYPE_UP>(stage, weights, group0, sums);
    }
}

// Leaves the tile's results [token][row] at the start of shared memory, seen by all.
FM_DEV float* compute_tile(const TileJob& job, const Activations& a, unsigned char* shared) {
    int* const row_of = row_of_in(shared);
    find_rows(job, row_of);
    fm_barrier();
    for (int step = 0; step < TILE_STAGES - 1; step++) copy_step(job, a, row_of, shared, step);
    Sums sums = {};
    for (int step = 0; step < kSteps; step++) {
        if constexpr (TILE_STAGES == 1) {
            fm_barrier();  // all have taken the step before
            copy_step(job, a, row_of, shared, step);
            fm_copy_wait<0>();
            fm_barrier();
        } else {
            fm_copy_wait<TILE_STAGES - 2>();
            fm_barrier();  // what came is seen by all, and all have taken the step before
            copy_step(job, a, row_of, shared, step + TILE_STAGES - 1);
        }
        compute_step(job, shared, step, sums);
    }
    fm_barrier();
    float* const out = reinterpret_cast<float*>(shared);
    store_sums(sums, out);
    fm_barrier();
    return out;
}
