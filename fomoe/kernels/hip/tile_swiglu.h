// silu(gate) * up of a tile whose halves are rows of gate and of up, stored as the activations of
// the next product: int8 (INT8) or float32.
#pragma once

#include "quantize32.h"
#include "tile.h"

static_assert(kHalfRows % 32 == 0, "whole groups of 32 in half a tile");

FM_DEV float silu(float x) { return x / (1.0f + fm_exp(-x)); }

// silu(gate) * up in the place of gate, 32 values of one token; returns the largest size.
FM_DEV float swiglu_32(float* gate, const float* up) {
    float most = 0.0f;
    for (int i = 0; i < 32; i++) {
        gate[i] = silu(gate[i]) * up[i];
        most = fm_max(most, fm_abs(gate[i]));
    }
    return most;
}

FM_DEV fm_f2 quantize_32(const float* x, float most, unsigned* q) {
    const float d = most / 127.0f;
    int sum = 0;
    for (int i = 0; i < 8; i++) {
        int four[4];
        FM_UNROLL
        for (int j = 0; j < 4; j++) sum += four[j] = quantized(x[4 * i + j], d);
        q[i] = packed(four);
    }
    return fm_f2{d, d * float(sum)};
}

// What silu(gate) * up of each pair is stored as, `rows` values a pair.
struct SwigluRows {
    signed char* q;
    fm_f2* s;
    float* x;
};

FM_DEV void store_swiglu(float* tile, const TileJob& job, const SwigluRows& out) {
    constexpr int kAcross = kHalfRows / 32;
    for (int i = fm_thread(); i < TILE_TOKENS * kAcross; i += THREADS) {
        const int token = i / kAcross, row = i % kAcross * 32, first = job.first + row;
        if (token >= job.pairs || first >= job.rows) continue;
        float* const gate = tile + token * kOutStride + row;
        [[maybe_unused]] const float most = swiglu_32(gate, gate + kHalfRows);
        const long long at = (long long)(job.pair + token) * job.rows + first;
#if INT8
        out.s[at / 32] = quantize_32(gate, most, reinterpret_cast<unsigned*>(out.q + at));
#else
        for (int j = 0; j < 32; j++) out.x[at + j] = gate[j];
#endif
    }
}
