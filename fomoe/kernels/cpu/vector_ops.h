// Element-wise kernels, norms, rotary embedding and the quantisation of activations.
#pragma once

#include "simd.h"
#include "table.h"

namespace fomoe::cpu::FOMOE_ISA {

// Calls body(offset, lanes) for each 8 values of n, the last time with fewer lanes.
template <class Body>
inline void by_eights(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) body(i, 8);
  if (i < n) body(i, static_cast<int>(n - i));
}
inline F8 load_upto(const float* p, int n) { return n == 8 ? load(p) : load_n(p, n); }
inline void store_upto(float* p, F8 a, int n) {
  if (n == 8)
    store(p, a);
  else
    store_n(p, a, n);
}

// exp by 2^n * p(r), |r| <= ln 2 / 2, polynomial of Cephes' expf; within 2 ulp. 2^n is multiplied
// in two halves, so that large x give infinity and small x subnormals, then 0; NaN stays NaN.
inline F8 exp(F8 x) {
  x = min(splat(130.0f), max(splat(-130.0f), x));
  const F8 n = round_even(mul(x, splat(1.44269504f)));
  const F8 r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  F8 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, splat(1.0f)));
  const F8 half = round_even(mul(n, splat(0.5f)));
  return scale_by_power(scale_by_power(p, to_int(half)), to_int(sub(n, half)));
}
// 1 + exp(-x): x / this is silu, 1 / this is sigmoid
inline F8 one_plus_exp_minus(F8 x) { return add(splat(1.0f), exp(sub(zero(), x))); }
inline F8 silu(F8 x) { return div(x, one_plus_exp_minus(x)); }
inline F8 sigmoid(F8 x) { return div(splat(1.0f), one_plus_exp_minus(x)); }
inline float sigmoid_one(float x) { return first(sigmoid(splat(x))); }

inline void quantize(const float* x, int64_t n, int8_t* q, float* scale) {
  for (int64_t g = 0; g < n / 32; ++g, x += 32, q += 32) {
    F8 v[4], top = zero();
    for (int i = 0; i < 4; ++i) {
      v[i] = load(x + 8 * i);
      top = max(top, abs(v[i]));
    }
    const float s = max_lane(top) / 127.0f;
    scale[g] = s;
    // The clamp matters where the scale is subnormal (and so inexact) or x is not finite.
    for (int i = 0; i < 4; ++i) {
      const F8 ratio = s > 0.0f ? div(v[i], splat(s)) : zero();
      const F8 clamped = max(min(ratio, splat(127.0f)), splat(-127.0f));
      store_int8(q + 8 * i, round_even(clamped));
    }
  }
}

inline float sum_of_squares(const float* x, int64_t n) {
  F8 acc[2] = {zero(), zero()};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int s = 0; s < 2; ++s) {
      const F8 v = load(x + i + 8 * s);
      acc[s] = fma(v, v, acc[s]);
    }
  by_eights(n - i, [&](int64_t j, int lanes) {
    const F8 v = load_upto(x + i + j, lanes);
    F8& a = j == 0 ? acc[0] : acc[1];
    a = fma(v, v, a);
  });
  return sum(add(acc[0], acc[1]));
}

inline void rms_norm(const float* x, const float* z, const float* weight, int64_t n, float eps,
                     float* out) {
  const float mean = sum_of_squares(x, n) / static_cast<float>(n);
  const F8 factor = splat(1.0f / __builtin_sqrtf(mean + eps));
  by_eights(n, [&](int64_t i, int lanes) {
    F8 v = mul(mul(load_upto(x + i, lanes), factor), load_upto(weight + i, lanes));
    if (z) v = mul(v, silu(load_upto(z + i, lanes)));
    store_upto(out + i, v, lanes);
  });
}

inline void l2_norm(const float* x, int64_t n, float eps, float factor, float* out) {
  const F8 both = splat(factor / __builtin_sqrtf(sum_of_squares(x, n) + eps));
  by_eights(n, [&](int64_t i, int lanes) {
    store_upto(out + i, mul(load_upto(x + i, lanes), both), lanes);
  });
}

inline void silu_mul(const float* gate, const float* up, int64_t n, float* out) {
  by_eights(n, [&](int64_t i, int lanes) {
    store_upto(out + i, mul(silu(load_upto(gate + i, lanes)), load_upto(up + i, lanes)), lanes);
  });
}

inline void sigmoid_gate(float* x, const float* gate, int64_t n) {
  by_eights(n, [&](int64_t i, int lanes) {
    const F8 factor = sigmoid(load_upto(gate + i, lanes));
    store_upto(x + i, mul(load_upto(x + i, lanes), factor), lanes);
  });
}

inline void scale(float* x, float factor, int64_t n) {
  by_eights(n, [&](int64_t i, int lanes) {
    store_upto(x + i, mul(load_upto(x + i, lanes), splat(factor)), lanes);
  });
}

inline void add_to(float* a, const float* b, int64_t n) {
  by_eights(n, [&](int64_t i, int lanes) {
    store_upto(a + i, add(load_upto(a + i, lanes), load_upto(b + i, lanes)), lanes);
  });
}

inline void add3(const float* routed, const float* shared, float* residual, int64_t n) {
  by_eights(n, [&](int64_t i, int lanes) {
    const F8 both = add(load_upto(routed + i, lanes), load_upto(shared + i, lanes));
    store_upto(residual + i, add(both, load_upto(residual + i, lanes)), lanes);
  });
}

inline void weighted_sum(const float* pairs, const int32_t* order, const float* weights, int64_t k,
                         int64_t n, float* out) {
  by_eights(n, [&](int64_t i, int lanes) {
    F8 acc = zero();
    for (int64_t j = 0; j < k; ++j)
      acc = fma(load_upto(pairs + order[j] * n + i, lanes), splat(weights[j]), acc);
    store_upto(out + i, acc, lanes);
  });
}

inline void add_scaled(const float* x, float factor, int64_t n, float* out) {
  by_eights(n, [&](int64_t i, int lanes) {
    store_upto(out + i, fma(load_upto(x + i, lanes), splat(factor), load_upto(out + i, lanes)),
               lanes);
  });
}

inline void rotate(float* x, const float* cosine, const float* sine, int64_t half) {
  by_eights(half, [&](int64_t i, int lanes) {
    const F8 a = load_upto(x + i, lanes), b = load_upto(x + half + i, lanes);
    const F8 c = load_upto(cosine + i, lanes), s = load_upto(sine + i, lanes);
    store_upto(x + i, sub(mul(a, c), mul(b, s)), lanes);
    store_upto(x + half + i, add(mul(b, c), mul(a, s)), lanes);
  });
}

inline void to_f16(const float* x, int64_t n, uint16_t* out) {
  by_eights(n, [&](int64_t i, int lanes) {
    uint16_t eight[8];
    store_f16(eight, load_upto(x + i, lanes));
    std::memcpy(out + i, eight, 2 * static_cast<size_t>(lanes));
  });
}

}  // namespace fomoe::cpu::FOMOE_ISA
