// Rows for the product that comes next: float32, or int8 per 32 values with float2 (d, d * sum).
#pragma once

#include "unit.h"

// d = max |x| / 127, q = x / d rounded half to even. What is null is not written.
struct RowsOut {
  float* x;        // [T, n]
  signed char* q;  // [T, n]
  fm_f2* s;        // [T, n / 32]
};

constexpr int kQuantBlock = 32;

FM_DEV float quant_scale(float top) { return top / 127.0f; }

FM_DEV int quantise(float value, float d) {
  if (!(d > 0.0f)) return 0;
  return (int)fm_rint(fm_max(-127.0f, fm_min(127.0f, value / d)));
}

FM_DEV fm_f2 quant_pair(float d, int sum) {
  fm_f2 pair;
  pair.x = d;
  pair.y = d * (float)sum;
  return pair;
}

// Four values of each of 8 lanes, a block of 32; `index` is that of the first of this lane's four.
FM_DEV void put_four(const RowsOut& out, long long index, const float* v, bool has) {
  if (out.x && has) store_floats<4>(out.x + index, v);
  if (!out.q) return;
  float top = 0.0f;
  FM_UNROLL
  for (int i = 0; i < 4; ++i) top = fm_max(top, fm_abs(v[i]));
  const float d = quant_scale(lanes_max<8>(top));
  unsigned packed = 0;
  int sum = 0;
  FM_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int q = quantise(v[i], d);
    packed |= ((unsigned)q & 255u) << 8 * i;
    sum += q;
  }
  sum = lanes_sum<8>(sum);
  if (!has) return;
  *(unsigned*)(out.q + index) = packed;
  if (unit_lane() % 8 == 0) out.s[index / kQuantBlock] = quant_pair(d, sum);
}

template <int D>
FM_DEV void put_vector(const RowsOut& out, long long first, const UnitVector<D>& v, bool has) {
  FM_UNROLL
  for (int s = 0; s < UnitVector<D>::kStrips; ++s)
    put_four(out, first + v.at(s), v.v + 4 * s, has && v.has(s));
}

// One value of each lane of a unit, a block of 32.
FM_DEV void put_one(const RowsOut& out, long long index, float value, bool has) {
  if (out.x && has) out.x[index] = value;
  if (!out.q) return;
  const float d = quant_scale(lanes_max(fm_abs(value)));
  const int q = quantise(value, d), sum = lanes_sum(q);
  if (!has) return;
  out.q[index] = (signed char)q;
  if (unit_lane() == 0) out.s[index / kQuantBlock] = quant_pair(d, sum);
}
