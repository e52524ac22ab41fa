// Rows of a prompt's tokens, one group of THREADS per token (or per piece of one).
#include "quantize32.h"
#include "step.h"

constexpr int kWaves = THREADS / FM_WAVE;

// Of all threads of the group, in one fixed order.
FM_DEV float group_sum(float value, float* of_wave) {
    value = fm_wave_sum(value);
    if (fm_lane() == 0) of_wave[fm_thread() / FM_WAVE] = value;
    fm_barrier();
    float sum = 0.0f;
    for (int i = 0; i < kWaves; i++) sum += of_wave[i];
    return sum;
}

#ifdef COLS
constexpr int kFours = COLS / 4, kTurns = (kFours + THREADS - 1) / THREADS;
static_assert(COLS % 32 == 0 && THREADS % FM_WAVE == 0, "whole groups of 32, whole waves");

FM_DEV float largest(const fm_f4& v) {
    return fm_max(fm_max(fm_abs(v.x), fm_abs(v.y)), fm_max(fm_abs(v.z), fm_abs(v.w)));
}

// Eight neighbouring lanes hold 32 values; all lanes of the wave come here.
FM_DEV void store_quantized(const fm_f4& v, int four, bool is_inside, signed char* q, fm_f2* s) {
    float most = largest(v);
    for (int mask = 1; mask < 8; mask *= 2) most = fm_max(most, fm_wave_xor(most, mask));
    const float d = most / 127.0f;
    const int each[4] = {quantized(v.x, d), quantized(v.y, d), quantized(v.z, d), quantized(v.w, d)};
    int sum = each[0] + each[1] + each[2] + each[3];
    for (int mask = 1; mask < 8; mask *= 2) sum += fm_wave_xor(sum, mask);
    if (!is_inside) return;
    reinterpret_cast<unsigned*>(q)[four] = packed(each);
    if (four % 8 == 0) s[four / 8] = fm_f2{d, d * float(sum)};
}

// RMS norm of rows x [T][COLS], as int8 and scales and (FLOAT_ROWS) as float32 `out`.
FM_KERNEL(THREADS) void norm_rows(const fm_step* step, const float* x, const float* weight, float eps,
                                  float* out, signed char* q, fm_f2* s) {
    FM_SHARED float of_wave[kWaves];
    const int token = blockIdx.x;
    if (token >= step->tokens) return;
    const fm_f4* const row = reinterpret_cast<const fm_f4*>(x + (long long)token * COLS);
    fm_f4 v[kTurns];
    float squares = 0.0f;
    FM_UNROLL
    for (int i = 0; i < kTurns; i++) {
        const int four = fm_thread() + i * THREADS;
        v[i] = four < kFours ? row[four] : fm_f4{0.0f, 0.0f, 0.0f, 0.0f};
        squares += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
    }
    const float scale = 1.0f / fm_sqrt(group_sum(squares, of_wave) / COLS + eps);
    FM_UNROLL
    for (int i = 0; i < kTurns; i++) {
        const int four = fm_thread() + i * THREADS;
        const bool is_inside = four < kFours;
        const fm_f4 w = reinterpret_cast<const fm_f4*>(weight)[is_inside ? four : 0];
        const fm_f4 y = {v[i].x * scale * w.x, v[i].y * scale * w.y, v[i].z * scale * w.z, v[i].w * scale * w.w};
#if FLOAT_ROWS
        if (is_inside) reinterpret_cast<fm_f4*>(out + (long long)token * COLS)[four] = y;
#endif
#if INT8
        store_quantized(y, four, is_inside, q + (long long)token * COLS, s + (long long)token * (COLS / 32));
#endif
    }
}

// out [T] = rows x [T][COLS] times one vector; one wave per token.
FM_KERNEL(THREADS) void dot_rows(const fm_step* step, const float* x, const float* vector, float* out) {
    const int token = blockIdx.x * kWaves + fm_thread() / FM_WAVE;
    float sum = 0.0f;
    if (token < step->tokens)
        for (int i = fm_lane(); i < COLS; i += FM_WAVE) sum = fm_fma(x[(long long)token * COLS + i], vector[i], sum);
    sum = fm_wave_sum(sum);
    if (token < step->tokens && fm_lane() == 0) out[token] = sum;
}
#endif

#ifdef TOP_K
FM_DEV void add_weighted(fm_f4& sum, float weight, const fm_f4& v) {
    sum.x = fm_fma(weight, v.x, sum.x), sum.y = fm_fma(weight, v.y, sum.y);
    sum.z = fm_fma(weight, v.z, sum.z), sum.w = fm_fma(weight, v.w, sum.w);
}

// x [T][HIDDEN] = (the weighted sum of a token's TOP_K pairs, in their order, + shared *
// sigmoid(scale)) + x. `place` [T][TOP_K] is where each of them lies in `pairs` [..][HIDDEN].
// PARTS: 1 writes that sum alone; 2 takes it as `pairs` [T][HIDDEN] and adds the rest; 3 does both.
FM_KERNEL(THREADS) void combine(const fm_step* step, const float* pairs, const int* place, const float* weights,
                                const float* shared, const float* scale, float* x) {
    const int token = blockIdx.y, four = blockIdx.x * THREADS + fm_thread();
    if (token >= step->tokens || four >= HIDDEN / 4) return;
    const long long at = (long long)token * (HIDDEN / 4) + four;
    fm_f4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#if PARTS & 1
    for (int k = 0; k < TOP_K; k++) {
        const int pair = token * TOP_K + k;
        const fm_f4* const row = reinterpret_cast<const fm_f4*>(pairs + (long long)place[pair] * HIDDEN);
        add_weighted(sum, weights[pair], row[four]);
    }
#else
    sum = reinterpret_cast<const fm_f4*>(pairs)[at];
#endif
    fm_f4* const out = reinterpret_cast<fm_f4*>(x) + at;
#if PARTS & 2
    const float part = 1.0f / (1.0f + fm_exp(-scale[token]));
    const fm_f4 other = reinterpret_cast<const fm_f4*>(shared)[at];
    const fm_f4 before = *out;
    sum = fm_f4{(sum.x + other.x * part) + before.x, (sum.y + other.y * part) + before.y,
                (sum.z + other.z * part) + before.z, (sum.w + other.w * part) + before.w};
#endif
    *out = sum;
}
#endif
