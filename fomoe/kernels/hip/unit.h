// Thirty-two neighbouring lanes that work on one vector together: a unit. A wave is one or two.
//
// All lanes of a wave must come to these functions, those without work with zeros.
#pragma once

constexpr int kUnit = 32;

FM_DEV int unit_index() { return (int)threadIdx.x / kUnit; }
FM_DEV int unit_lane() { return (int)threadIdx.x % kUnit; }
FM_DEV int wave_index() { return (int)threadIdx.x / FM_WAVE; }

// The sum over `Lanes` neighbouring lanes, a power of two; all of them get it.
template <int Lanes = kUnit>
FM_DEV float lanes_sum(float v) {
  FM_UNROLL
  for (int mask = Lanes / 2; mask; mask /= 2) v += fm_wave_xor(v, mask);
  return v;
}
template <int Lanes = kUnit>
FM_DEV int lanes_sum(int v) {
  FM_UNROLL
  for (int mask = Lanes / 2; mask; mask /= 2) v += fm_wave_xor(v, mask);
  return v;
}
template <int Lanes = kUnit>
FM_DEV float lanes_max(float v) {
  FM_UNROLL
  for (int mask = Lanes / 2; mask; mask /= 2) v = fm_max(v, fm_wave_xor(v, mask));
  return v;
}

// N floats, a multiple of 4, at an address that is a multiple of 16.
template <int N>
FM_DEV void load_floats(const float* p, float* out) {
  FM_UNROLL
  for (int i = 0; i < N; i += 4) {
    const fm_u4 four = fm_load16(p + i);
    out[i] = fm_bits<float>(four.x);
    out[i + 1] = fm_bits<float>(four.y);
    out[i + 2] = fm_bits<float>(four.z);
    out[i + 3] = fm_bits<float>(four.w);
  }
}
template <int N>
FM_DEV void store_floats(float* p, const float* values) {
  FM_UNROLL
  for (int i = 0; i < N; i += 4) {
    fm_u4 four;
    four.x = fm_bits<unsigned>(values[i]);
    four.y = fm_bits<unsigned>(values[i + 1]);
    four.z = fm_bits<unsigned>(values[i + 2]);
    four.w = fm_bits<unsigned>(values[i + 3]);
    *(fm_u4*)(p + i) = four;
  }
}

// A vector of D floats over a unit: strip s of lane l holds elements 128 s + 4 l to + 3. Lanes
// without elements hold zeros.
template <int D>
struct UnitVector {
  static_assert(D % 4 == 0, "vectors are cut into fours");
  static constexpr int kStrips = (D + 4 * kUnit - 1) / (4 * kUnit);
  static constexpr int kHeld = 4 * kStrips;
  float v[kHeld];

  static FM_DEV int at(int strip) { return 4 * kUnit * strip + 4 * unit_lane(); }
  static FM_DEV bool has(int strip) { return at(strip) < D; }

  FM_DEV void load(const float* p) {
    FM_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      for (int i = 0; i < 4; ++i) v[4 * s + i] = 0.0f;
      if (has(s)) load_floats<4>(p + at(s), v + 4 * s);
    }
  }
  FM_DEV void store(float* p) const {
    FM_UNROLL
    for (int s = 0; s < kStrips; ++s)
      if (has(s)) store_floats<4>(p + at(s), v + 4 * s);
  }
  FM_DEV void scale(float factor) {
    FM_UNROLL
    for (int i = 0; i < kHeld; ++i) v[i] *= factor;
  }
  FM_DEV void scale(const UnitVector& factors) {
    FM_UNROLL
    for (int i = 0; i < kHeld; ++i) v[i] *= factors.v[i];
  }
  FM_DEV float dot(const UnitVector& other) const {
    float sum = 0.0f;
    FM_UNROLL
    for (int i = 0; i < kHeld; ++i) sum = fm_fma(v[i], other.v[i], sum);
    return lanes_sum(sum);
  }
};

FM_DEV float sigmoid(float x) { return 1.0f / (1.0f + fm_exp(-x)); }
FM_DEV float silu(float x) { return x / (1.0f + fm_exp(-x)); }

// v / sqrt(mean(v^2) + eps) * weight
template <int D>
FM_DEV void rms_norm(UnitVector<D>& v, const UnitVector<D>& weight, float eps) {
  v.scale(1.0f / fm_sqrt(v.dot(v) / (float)D + eps));
  v.scale(weight);
}
template <int D>
FM_DEV void rms_norm(UnitVector<D>& v, const float* weight, float eps) {
  UnitVector<D> w;
  w.load(weight);
  rms_norm(v, w, eps);
}
