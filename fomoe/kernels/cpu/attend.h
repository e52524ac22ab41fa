// Softmax attention of the query heads of a few tokens that share a kv head, over one block.
//
// One order for each output, whatever tokens share the call: lane j of a score takes the dims
// 8 i + j in turn and the lanes are added by sum(); lane j of a mass takes the positions 8 i + j of
// the block and the lanes are added by sum(); a value is a chain of fma over the block's positions.
#pragma once

#include "floats16.h"
#include "vector_ops.h"

namespace fomoe::cpu::FOMOE_ISA {

// The rows of a kv head lie apart, with those of the others between: the hardware's own guess at
// what comes next is poor.
template <class T>
inline void fetch_row(const T* p, int64_t dim) {
  for (int64_t i = 0; i < dim; i += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(p + i, 0, 2);
}

struct HalfCache {
  const uint16_t* data;
  int64_t stride;
  F8 at(int64_t position, int64_t i) const { return load_f16(data + position * stride + i); }
  void fetch(int64_t position, int64_t dim) const { fetch_row(data + position * stride, dim); }
};
struct FloatCache {
  const float* data;
  int64_t stride;
  F8 at(int64_t position, int64_t i) const { return load(data + position * stride + i); }
  void fetch(int64_t position, int64_t dim) const { fetch_row(data + position * stride, dim); }
};

constexpr int kKeys = 16;  // positions whose keys are unpacked together: 16 KB for heads of 256
constexpr int kPairs = kWideRegisters ? 4 : 1;  // pairs of them per tile of scores
constexpr int kScoreRows = 4;

// Keys of `count` positions as float32 [kKeys / 2][dim / 8][2][8], zeros from there on.
template <class Cache>
inline void unpack_keys(Cache k, int64_t first, int64_t count, int64_t dim, float* keys) {
  for (int64_t j = 0; j < kKeys; ++j) {
    k.fetch(first + kKeys + j, dim);
    float* const to = keys + j / 2 * 2 * dim + j % 2 * 8;
    for (int64_t i = 0; i < dim; i += 8) store(to + 2 * i, j < count ? k.at(first + j, i) : zero());
  }
}

// Products of R queries with 2 P keys, lanes not yet added: partial [R][kKeys][8].
template <int R, int P>
FOMOE_INLINE void score_tile(const float* q, const float* keys, int64_t dim, float* partial) {
  W16 acc[R][P];
  for (auto& row : acc)
    for (W16& a : row) a = wide_splat(0.0f);
  for (int64_t i = 0; i < dim; i += 8) {
    W16 key[P];
    for (int p = 0; p < P; ++p) key[p] = wide_load(keys + 2 * (p * dim + i));
    for (int r = 0; r < R; ++r) {
      const W16 query = load_both(q + r * dim + i);
      for (int p = 0; p < P; ++p) acc[r][p] = fma(query, key[p], acc[r][p]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) store(partial + (r * kKeys + 2 * p) * 8, acc[r][p]);
}

// Scores of R queries at kKeys positions.
template <int R>
inline void score(const float* q, const float* keys, int64_t dim, float* out, int64_t out_stride) {
  alignas(64) float partial[R * kKeys * 8];
  for (int p = 0; p < kKeys / 2; p += kPairs)
    score_tile<R, kPairs>(q, keys + 2 * p * dim, dim, partial + 16 * p);
  const F8 factor = splat(1.0f / __builtin_sqrtf(static_cast<float>(dim)));
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < kKeys; j += 8)
      store(out + r * out_stride + j, mul(sums_of_rows(partial + (r * kKeys + j) * 8), factor));
}

// Positions whose values are unpacked together, float32 [kValues][dim + 16]: rows a power of two
// apart would push each other out of L1.
constexpr int64_t kValues = 32;
constexpr int64_t value_stride(int64_t dim) { return dim + 16; }

template <class Cache>
inline void unpack_values(Cache v, int64_t first, int64_t count, int64_t dim, float* values) {
  for (int64_t j = 0; j < count; ++j) {
    v.fetch(first + kValues + j, dim);
    for (int64_t i = 0; i < dim; i += 8)
      store(values + j * value_stride(dim) + i, v.at(first + j, i));
  }
}

// out[r] += sum over count positions of p[r, position] * value[position], N vectors of columns.
template <int R, int N, int Lanes>
FOMOE_INLINE void mix(const float* p, int64_t p_stride, const float* values, int64_t count,
                      int64_t dim, float* out) {
  using From = Vector<Lanes>;
  using V = typename From::type;
  V acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) acc[r][n] = From::load(out + r * dim + n * Lanes);
  for (int64_t j = 0; j < count; ++j, values += value_stride(dim)) {
    V value[N];
    for (int n = 0; n < N; ++n) value[n] = From::load(values + n * Lanes);
    for (int r = 0; r < R; ++r) {
      const V weight = From::splat(p[r * p_stride + j]);
      for (int n = 0; n < N; ++n) acc[r][n] = fma(weight, value[n], acc[r][n]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(out + r * dim + n * Lanes, acc[r][n]);
}

// Scores -> exp(score - top) in place; returns their sum.
inline float softmax_part(float* scores, int64_t count, float* top) {
  F8 highest = splat(scores[0]);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) highest = max(highest, load(scores + i));
  float m = max_lane(highest);
  for (; i < count; ++i) m = scores[i] > m ? scores[i] : m;
  *top = m;
  F8 mass = zero();
  by_eights(count, [&](int64_t j, int lanes) {
    store_upto(scores + j, exp(sub(load_upto(scores + j, lanes), splat(m))), lanes);
    mass = add(mass, load_upto(scores + j, lanes));
  });
  return sum(mass);
}

template <class Cache>
class Attend {
 public:
  Attend(const AttendBlock& b, Cache k, Cache v, float* memory)
      : b_(b), k_(k), v_(v), unpacked_(memory), scores_(memory + kValues * value_stride(b.dim)) {}

  void run(const SoftmaxPart& s) const {
    const int64_t most = b_.count(b_.tokens - 1);
    for (int64_t first = 0; first < most; first += kKeys) {
      unpack_keys(k_, first, upto(kKeys, most - first), b_.dim, unpacked_);
      for (int64_t t = 0; t < b_.tokens; ++t)
        if (b_.count(t) > first) score_token(t, first);
    }
    for (int64_t t = 0; t < b_.tokens; ++t)
      for (int64_t r = t * b_.group; r < (t + 1) * b_.group && b_.count(t) > 0; ++r)
        s.mass[r] = softmax_part(scores_ + r * kScoreStride, b_.count(t), s.top + r);
    std::memset(s.out, 0, static_cast<size_t>(b_.tokens * b_.group * b_.dim) * sizeof(float));
    for (int64_t first = 0; first < most; first += kValues) {
      unpack_values(v_, first, upto(kValues, most - first), b_.dim, unpacked_);
      int64_t i = 0;
      for (; i + kStrip <= b_.dim; i += kStrip) mix_strip<kStrip / 16, 16>(first, i, s.out);
      for (; i < b_.dim; i += 8) mix_strip<1, 8>(first, i, s.out);
    }
  }

 private:
  static constexpr int64_t kStrip = kWideRegisters ? 32 : 16;  // columns of values per tile

  static int64_t upto(int64_t most, int64_t n) { return n < most ? n : most; }

  void score_token(int64_t t, int64_t first) const {
    const float* const q = b_.q + t * b_.q_stride;
    float* const out = scores_ + t * b_.group * kScoreStride + first;
    int64_t h = 0;
    for (; h + kScoreRows <= b_.group; h += kScoreRows)
      score<kScoreRows>(q + h * b_.dim, unpacked_, b_.dim, out + h * kScoreStride, kScoreStride);
    for (; h < b_.group; ++h)
      score<1>(q + h * b_.dim, unpacked_, b_.dim, out + h * kScoreStride, kScoreStride);
  }

  // All rows on some columns, so that their values stay in L1. Rows of a token see as much each.
  template <int N, int Lanes>
  void mix_strip(int64_t first, int64_t i, float* out) const {
    for (int64_t t = 0; t < b_.tokens; ++t) {
      const int64_t count = upto(kValues, b_.count(t) - first), end = (t + 1) * b_.group;
      if (count <= 0) continue;
      int64_t r = t * b_.group;
      if constexpr (kWideRegisters)
        for (; r + 8 <= end; r += 8) mix_rows<8, N, Lanes>(r, first, i, count, out);
      for (; r + 4 <= end; r += 4) mix_rows<4, N, Lanes>(r, first, i, count, out);
      for (; r < end; ++r) mix_rows<1, N, Lanes>(r, first, i, count, out);
    }
  }
  template <int R, int N, int Lanes>
  void mix_rows(int64_t r, int64_t first, int64_t i, int64_t count, float* out) const {
    mix<R, N, Lanes>(scores_ + r * kScoreStride + first, kScoreStride, unpacked_ + i, count, b_.dim,
                 out + r * b_.dim + i);
  }

  const AttendBlock& b_;
  const Cache k_, v_;
  float *const unpacked_, *const scores_;
};

inline void attend(const AttendBlock& b, float* memory, const SoftmaxPart& out) {
  if (b.k.f16) {
    const HalfCache keys{static_cast<const uint16_t*>(b.k.data), b.k.stride};
    const HalfCache values{static_cast<const uint16_t*>(b.v.data), b.v.stride};
    Attend<HalfCache>(b, keys, values, memory).run(out);
  } else {
    const FloatCache keys{static_cast<const float*>(b.k.data), b.k.stride};
    const FloatCache values{static_cast<const float*>(b.v.data), b.v.stride};
    Attend<FloatCache>(b, keys, values, memory).run(out);
  }
}

// Folds a partial result of some rows into a running one.
inline void fold(int64_t rows, int64_t dim, const SoftmaxPart& part, const SoftmaxPart& whole) {
  for (int64_t r = 0; r < rows; ++r) {
    const float m = part.top[r] > whole.top[r] ? part.top[r] : whole.top[r];
    const F8 a = exp(splat(whole.top[r] - m)), b = exp(splat(part.top[r] - m));
    whole.top[r] = m;
    whole.mass[r] = __builtin_fmaf(whole.mass[r], first(a), part.mass[r] * first(b));
    for (int64_t i = r * dim; i < (r + 1) * dim; i += 8)
      store(whole.out + i, fma(load(whole.out + i), a, mul(load(part.out + i), b)));
  }
}

}  // namespace fomoe::cpu::FOMOE_ISA
