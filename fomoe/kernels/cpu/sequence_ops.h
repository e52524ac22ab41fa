// Kernels that look at other positions: attention, causal convolution, gated delta rule.
#pragma once

#include "vector_ops.h"

namespace fomoe::cpu::FOMOE_ISA {

struct HalfCache {
    const uint16_t* data;
    int64_t stride;
    F8 at(int64_t position, int64_t i) const { return load_f16(data + position * stride + i); }
};
struct FloatCache {
    const float* data;
    int64_t stride;
    F8 at(int64_t position, int64_t i) const { return load(data + position * stride + i); }
};

// Scores of H heads at one position.
template <int H, class Cache>
inline void score(const float* q, int64_t dim, Cache k, int64_t position, F8 factor, float* out,
                  int64_t out_stride) {
    F8 acc[H];
    for (F8& a : acc) a = zero();
    for (int64_t i = 0; i < dim; i += 8) {
        const F8 key = k.at(position, i);
        for (int h = 0; h < H; ++h) acc[h] = fma(load(q + h * dim + i), key, acc[h]);
    }
    for (int h = 0; h < H; ++h)
        out[h * out_stride + position] = sum(acc[h]) * first(factor);
}

// out[h, i .. i + 8 V] = sum over positions of p[h, position] * v[position]
template <int H, int V, class Cache>
inline void mix(const float* p, int64_t p_stride, Cache v, int64_t count, int64_t dim, int64_t i,
                float* out) {
    F8 acc[H][V];
    for (auto& row : acc)
        for (F8& a : row) a = zero();
    for (int64_t j = 0; j < count; ++j)
        for (int n = 0; n < V; ++n) {
            const F8 value = v.at(j, i + 8 * n);
            for (int h = 0; h < H; ++h)
                acc[h][n] = fma(splat(p[h * p_stride + j]), value, acc[h][n]);
        }
    for (int h = 0; h < H; ++h)
        for (int n = 0; n < V; ++n) store(out + h * dim + i + 8 * n, acc[h][n]);
}

template <int H, class Cache>
inline void mix_all(const float* p, int64_t p_stride, Cache v, int64_t count, int64_t dim,
                    float* out) {
    int64_t i = 0;
    for (; i + 32 <= dim; i += 32) mix<H, 4>(p, p_stride, v, count, dim, i, out);
    for (; i < dim; i += 8) mix<H, 1>(p, p_stride, v, count, dim, i, out);
}

// Scores -> exp(score - top) in place; returns their sum.
inline float softmax_part(float* scores, int64_t count, float* top) {
    float m = scores[0];
    for (int64_t j = 1; j < count; ++j) m = scores[j] > m ? scores[j] : m;
    *top = m;
    F8 mass = zero();
    by_eights(count, [&](int64_t j, int lanes) {
        store_upto(scores + j, exp(sub(load_upto(scores + j, lanes), splat(m))), lanes);
        mass = add(mass, load_upto(scores + j, lanes));
    });
    return sum(mass);
}

template <class Cache>
inline void attend_cache(const float* q, int64_t heads, int64_t dim, Cache k, Cache v, int64_t count,
                         float* scores, float* top, float* mass, float* out) {
    const int64_t stride = (count + 7) / 8 * 8;
    const F8 factor = splat(1.0f / __builtin_sqrtf(static_cast<float>(dim)));
    for (int64_t j = 0; j < count; ++j) {
        int64_t h = 0;
        for (; h + 4 <= heads; h += 4)
            score<4>(q + h * dim, dim, k, j, factor, scores + h * stride, stride);
        for (; h < heads; ++h)
            score<1>(q + h * dim, dim, k, j, factor, scores + h * stride, stride);
    }
    for (int64_t h = 0; h < heads; ++h)
        mass[h] = softmax_part(scores + h * stride, count, top + h);
    int64_t h = 0;
    for (; h + 2 <= heads; h += 2)
        mix_all<2>(scores + h * stride, stride, v, count, dim, out + h * dim);
    for (; h < heads; ++h) mix_all<1>(scores + h * stride, stride, v, count, dim, out + h * dim);
}

inline void attend(const float* q, int64_t heads, int64_t dim, CacheHead k, CacheHead v,
                   int64_t count, float* scores, float* top, float* mass, float* out) {
    if (k.f16) {
        const HalfCache keys{static_cast<const uint16_t*>(k.data), k.stride};
        const HalfCache values{static_cast<const uint16_t*>(v.data), v.stride};
        attend_cache(q, heads, dim, keys, values, count, scores, top, mass, out);
    } else {
        const FloatCache keys{static_cast<const float*>(k.data), k.stride};
        const FloatCache values{static_cast<const float*>(v.data), v.stride};
        attend_cache(q, heads, dim, keys, values, count, scores, top, mass, out);
    }
}

inline void fold(int64_t heads, int64_t dim, const float* part_top, const float* part_mass,
                 const float* part_out, float* top, float* mass, float* out) {
    for (int64_t h = 0; h < heads; ++h) {
        const float m = part_top[h] > top[h] ? part_top[h] : top[h];
        const F8 a = exp(splat(top[h] - m)), b = exp(splat(part_top[h] - m));
        top[h] = m;
        mass[h] = __builtin_fmaf(mass[h], first(a), part_mass[h] * first(b));
        for (int64_t i = h * dim; i < (h + 1) * dim; i += 8)
            store(out + i, fma(load(out + i), a, mul(load(part_out + i), b)));
    }
}

// `state` [width - 1, channels] holds the inputs before token 0, oldest first.
inline void conv_silu(const float* x, const float* weight, float* state, int64_t tokens,
                      int64_t channels, int64_t width, int64_t begin, int64_t end, float* out) {
    const int64_t past = width - 1;
    by_eights(end - begin, [&](int64_t offset, int lanes) {
        const int64_t c = begin + offset;
        const auto input = [&](int64_t t) {  // t counts from the oldest remembered input
            return load_upto(t < past ? state + t * channels + c : x + (t - past) * channels + c,
                             lanes);
        };
        for (int64_t t = 0; t < tokens; ++t) {
            F8 acc = zero();
            for (int64_t w = 0; w < width; ++w) {
                float taps[8];
                for (int i = 0; i < lanes; ++i) taps[i] = weight[(c + i) * width + w];
                acc = fma(load_upto(taps, lanes), input(t + w), acc);
            }
            store_upto(out + t * channels + c, silu(acc), lanes);
        }
        for (int64_t t = 0; t < past; ++t)  // ascending: reads only rows not yet overwritten
            store_upto(state + t * channels + c, input(tokens + t), lanes);
    });
}

// One step per token on 8 V columns of the state: S = S * decay, d = beta * (v - S^T k),
// S = S + k d^T, out = S^T q.
template <int V>
inline void delta_columns(const float* q, const float* k, float decay, float beta, const float* v,
                          int64_t key_dim, int64_t value_dim, float* state, float* out) {
    F8 d[V], o[V];
    for (int n = 0; n < V; ++n) d[n] = o[n] = zero();
    for (int64_t i = 0; i < key_dim; ++i)
        for (int n = 0; n < V; ++n) {
            const F8 s = mul(load(state + i * value_dim + 8 * n), splat(decay));
            d[n] = fma(splat(k[i]), s, d[n]);
        }
    for (int n = 0; n < V; ++n) d[n] = mul(splat(beta), sub(load(v + 8 * n), d[n]));
    for (int64_t i = 0; i < key_dim; ++i)
        for (int n = 0; n < V; ++n) {
            float* at = state + i * value_dim + 8 * n;
            const F8 s = fma(splat(k[i]), d[n], mul(load(at), splat(decay)));
            store(at, s);
            o[n] = fma(splat(q[i]), s, o[n]);
        }
    for (int n = 0; n < V; ++n) store(out + 8 * n, o[n]);
}

inline void delta_head(const float* q, const float* k, int64_t qk_stride, const float* v,
                       int64_t v_stride, const float* decay, const float* beta,
                       int64_t gate_stride, int64_t tokens, int64_t key_dim, int64_t value_dim,
                       int64_t begin, int64_t end, float* state, float* out, int64_t out_stride) {
    const auto columns = [&](auto step, int64_t c) {
        for (int64_t t = 0; t < tokens; ++t)
            step(q + t * qk_stride, k + t * qk_stride, decay[t * gate_stride],
                 beta[t * gate_stride], v + t * v_stride + c, key_dim, value_dim, state + c,
                 out + t * out_stride + c);
    };
    int64_t c = begin;
    for (; c + 32 <= end; c += 32) columns(delta_columns<4>, c);
    for (; c < end; c += 8) columns(delta_columns<1>, c);
}

}  // namespace fomoe::cpu::FOMOE_ISA
