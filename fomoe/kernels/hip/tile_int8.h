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

// ---- copies; a loop of a known number of turns becomes straight code
template <int WORK>
constexpr int kTurns = (WORK + THREADS - 1) / THREADS;
// Whether a thread has a share in turn `i / THREADS`.
template <int WORK>
FM_DEV bool has_share(int i) {
    return WORK % THREADS == 0 || i < WORK;
}

FM_DEV unsigned beyond_16(Bytes p) { return unsigned(reinterpret_cast<unsigned long long>(p)) & 15; }

// One half of the tile's rows: kLanes threads take a row's words, so that a thread's rows lie a
// fixed distance apart. Rows beyond the matrix stay what they were: computed, never stored.
template <int T>
FM_DEV void copy_weights(Bytes matrix, int first, int rows, unsigned char* to, int step) {
    constexpr int kWords = Raw<T>::kWords, kLanes = kWords <= 8 ? 8 : kWords <= 16 ? 16 : 32;
    constexpr int kAtOnce = THREADS / kLanes;
    const int word = fm_thread() % kLanes, row = fm_thread() / kLanes;
    const Bytes start = matrix + (long long)(first + row) * Raw<T>::kRowBytes;
    const Bytes blocks = start + step * Raw<T>::kStepBytes;
    FM_UNROLL
    for (int turn = 0; turn < kTurns<kHalfRows * kLanes>; turn++) {
        const int at = turn * kAtOnce;
        const bool is_inside = (kHalfRows % kAtOnce == 0 || row + at < kHalfRows) && first + row + at < rows;
        if (word >= kWords || !is_inside) continue;
        Bytes from = blocks + (long long)at * Raw<T>::kRowBytes;
        if constexpr (!Raw<T>::kAligned) from -= beyond_16(from);
        from += 16 * word;
        if constexpr (!Raw<T>::kAligned || COLS % kStep != 0)
            if (from >= start + (long long)(at + 1) * Raw<T>::kRowBytes) continue;
        fm_copy16(to + (row + at) * kRawStride + 16 * word, from);
    }
}

FM_DEV void copy_quants(const Activations& a, const int* row_of, const Stage& to, int step) {
    constexpr int kWork = TILE_TOKENS * 16;
    FM_UNROLL
    for (int turn = 0; turn < kTurns<kWork>; turn++) {
        const int i = fm_thread() + turn * THREADS, token = i / 16, column = step * kStep + i % 16 * 16;
        if (has_share<kWork>(i) && (COLS % kStep == 0 || column < COLS))
            fm_copy16(to.q + token * kTokenStride + i % 16 * 16, a.q + (long long)row_of[token] * COLS + column);
    }
}

FM_DEV void copy_scales(const Activations& a, const int* row_of, const Stage& to, int step) {
    constexpr int kWork = TILE_TOKENS * 4;
    FM_UNROLL
    for (int turn = 0; turn < kTurns<kWork>; turn++) {
        const int i = fm_thread() + turn * THREADS, token = i / 4, group = step * 8 + i % 4 * 2;
        if (!has_share<kWork>(i) || (COLS % kStep != 0 && group >= kGroups)) continue;
        const fm_f2* const from = a.s + (long long)row_of[token] * kGroups + group;
        fm_f2* const at = to.s + token * kTokenScaleStride + i % 4 * 2;
        if constexpr (kGroups % 2 == 0) {
            fm_copy16(at, from);
        } else {
            at[0] = from[0];
            if (group + 1 < kGroups) at[1] = from[1];
        }
    }
}

FM_DEV void copy_step(const TileJob& job, const Activations& a, const int* row_of, unsigned char* shared, int step) {
    if (step < kSteps) {
        const Stage to = stage_of(shared, step);
        copy_weights<TYPE>(job.matrix, job.first, job.rows, to.raw, step);
        copy_weights<TYPE_UP>(job.up, job.first_up, job.rows, to.raw + kHalfRows * kRawStride, step);
        copy_quants(a, row_of, to, step);
        copy_scales(a, row_of, to, step);
    }
    fm_copy_commit();  // of nothing after the last step, so that waits count alike
}

// ---- raw blocks to int8
template <int T, int BEGIN, int END>
FM_DEV void unpack_rows(const TileJob& job, const Stage& from, const Unpacked& to, int group0) {
    constexpr int kWork = (END - BEGIN) * kPartGroups;
#pragma unroll 2
    for (int turn = 0; turn < kTurns<kWork>; turn++) {
        const int i = fm_thread() + turn * THREADS, row = BEGIN + i / kPartGroups, group = i % kPartGroups;
        if (!has_share<kWork>(i) || (COLS % kStep != 0 && group0 + group >= kGroups)) continue;
        Bytes blocks = from.raw + row * kRawStride;
        if constexpr (!Raw<T>::kAligned) {
            blocks += beyond_16(weight_row<T>(job, row) + group0 / 8 * Raw<T>::kStepBytes);
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
        unpack_rows<TYPE, 0, TILE_ROWS>(job, from, to, group0);
    } else {
        unpack_rows<TYPE, 0, kHalfRows>(job, from, to, group0);
        unpack_rows<TYPE_UP, kHalfRows, TILE_ROWS>(job, from, to, group0);
    }
}

// ---- sums
struct Sums {
    float at[kRowTiles][kTokenTiles][FM_TILE_REGS];
};
FM_DEV int wave_row() { return fm_thread() / FM_WAVE % kRowWaves * (16 * kRowTiles); }
FM_DEV int wave_token() { return fm_thread() / FM_WAVE / kRowWaves * (16 * kTokenTiles); }

// An integer sum stays below 2^22 in size, so that added to the bits of kFloatBase, 1.5 * 2^23, it
// makes the float of that much more; a conversion would run at a lower rate. A weight's scale has at
// most 19 significant bits (11 of a float16 times an integer of 8), so that scale * kFloatBase is
// exact, and one fma takes the base away, multiplies by the scale and rounds once.
constexpr int kFloatBits = 0x4b400000;
constexpr float kFloatBase = 12582912.0f;

FM_DEV fm_tile_c tile_base() {
    fm_tile_c c = fm_tile_zero();
    FM_UNROLL
    for (int i = 0; i < FM_TILE_REGS; i++) c[i] = kFloatBits;
    return c;
}

// The scales of a 16 x 32 tile's rows, for each of a lane's registers.
struct RowScales {
    fm_f2 scale[FM_TILE_REGS], base[FM_TILE_REGS];  // base: -scale * kFloatBase
};
FM_DEV RowScales row_scales(const fm_f2* scale) {
    RowScales rows;
    FM_UNROLL
    for (int i = 0; i < FM_TILE_REGS; i++) {
        const fm_f2 s = rows.scale[i] = scale[fm_tile_row(i)];
        rows.base[i] = fm_f2{-kFloatBase * s.x, -kFloatBase * s.y};
    }
    return rows;
}

// Adds scale * (the integer in c) * x.
FM_DEV float add_scaled(float sum, int c, float scale, float base, float x) {
    return fm_fma(fm_fma(scale, fm_bits<float>(c), base), x, sum);
}

// Adds the products of one group of 32 columns: w of a 16 x 32 tile's rows, x of its tokens.
template <int HALF>
FM_DEV void add_half(float* sums, const fm_tile_a& a, const fm_tile_b& b, const RowScales& w, const fm_f2* x) {
    fm_tile_c c = tile_base();
    fm_tile_mma_half<HALF>(c, a, b);
    FM_UNROLL
    for (int i = 0; i < FM_TILE_REGS; i++) {
        const float scale = HALF ? w.scale[i].y : w.scale[i].x, base = HALF ? w.base[i].y : w.base[i].x;
        sums[i] = add_scaled(sums[i], c[i], scale, base, x[i].x);
    }
}

template <int T>
FM_DEV void add_tile(float* sums, const fm_tile_a& a, const fm_tile_b& b, const RowScales& w, const fm_f2* x) {
    if constexpr (kHasHalves<T>) {
        add_half<0>(sums, a, b, w, x);
        add_half<1>(sums, a, b, w, x);
    } else {
        fm_tile_c c = tile_base();
        fm_tile_mma(c, a, b);
        FM_UNROLL
        for (int i = 0; i < FM_TILE_REGS; i++) {
            sums[i] = add_scaled(sums[i], c[i], w.scale[i].x, w.base[i].x, x[i].x);
            if constexpr (kHasMinima<T>) sums[i] = fm_fma(w.scale[i].y, x[i].y, sums[i]);
        }
    }
}

// RAGGED: as a rule a tile has fewer pairs than room for them, and waves leave out the tiles of 16 x 16
// without any. Else that is so of the last tile alone, and straight code is faster.
constexpr bool kSkips = RAGGED;

template <int T>
FM_DEV void add_group(const Stage& x, const Unpacked& w, int group, int step_group, int used, Sums& sums) {
    fm_tile_a a[kRowTiles];
    RowScales row_scale[kRowTiles];
    fm_f2 token_scale[FM_TILE_REGS];
    FM_UNROLL
    for (int r = 0; r < kRowTiles; r++) {
        const int row = wave_row() + 16 * r;
        a[r] = fm_tile_load_a(w.q + row * kWeightStride + 32 * group, kWeightStride);
        row_scale[r] = row_scales(w.scale + group * kScaleStride + row);
    }
    FM_UNROLL
    for (int t = 0; t < kTokenTiles; t++) {
        const int token = wave_token() + 16 * t;
        if (kSkips && t > 0 && 16 * t >= used) break;
        const fm_tile_b b = fm_tile_load_b(x.q + token * kTokenStride + 32 * step_group, kTokenStride);
        FM_UNROLL
        for (int i = 0; i < FM_TILE_REGS; i++)
            token_scale[i] = x.s[(token + fm_tile_col(i)) * kTokenScaleStride + step_group];
        FM_UNROLL
        for (int r = 0; r < kRowTiles; r++) add_tile<T>(sums.at[r][t], a[r], b, row_scale[r], token_scale);
    }
}

template <int T>
FM_DEV void add_part(const Stage& x, const Unpacked& w, int group0, int pairs, Sums& sums) {
    const int used = pairs - wave_token();
    if (kSkips && used <= 0) return;
#pragma unroll 1  // more of them at once take more registers than there are
    for (int group = 0; group < kPartGroups; group++)
        if (COLS % kStep == 0 || group0 + group < kGroups) add_group<T>(x, w, group, group0 % 8 + group, used, sums);
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
            add_part<TYPE>(stage, weights, group0, job.pairs, sums);
        else
            add_part<TYPE_UP>(stage, weights, group0, job.pairs, sums);
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
