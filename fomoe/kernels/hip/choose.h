// Top-k of router scores by one group: by score descending, then by lower id.
//
// The best of every few neighbours are ranked first: what is not above the K-th of these is not among
// the K best of all. Few scores are left, and their ranks are counted.
// A weight is the softmax over all scores, divided by the sum of the chosen ones: the sum over all
// cancels, exp(s - best) / sum over the chosen of exp(s - best) is left.
#pragma once

namespace choosing {

typedef unsigned long long Key;  // greater: chosen earlier

// Floats in their order as unsigned numbers (-0 is 0, every NaN has its place), then the lower id.
FM_DEV Key key_of(float score, int id) {
  const float plain = score + 0.0f;
  const unsigned bits = fm_bits<unsigned>(plain);
  const unsigned order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (Key)order << 32 | (0xffffffffu - (unsigned)id);
}
FM_DEV int id_of(Key key) { return (int)(0xffffffffu - (unsigned)key); }

FM_DEV float score_of(Key key) {
  const unsigned order = (unsigned)(key >> 32);
  const unsigned bits = order & 0x80000000u ? order & 0x7fffffffu : ~order;
  return fm_bits<float>(bits);
}

// Number of keys of [0, n) that come before `key`.
FM_DEV int rank_of(Key key, const Key* keys, int n) {
  int rank = 0;
#pragma unroll 8  // more would take the registers of the kernel around it
  for (int j = 0; j < n; ++j) rank += keys[j] > key ? 1 : 0;
  return rank;
}

// The largest key of `kLanes` neighbouring lanes, a power of two, in each of them.
template <int kLanes>
FM_DEV Key best_of_lanes(Key key) {
  FM_UNROLL
  for (int mask = kLanes / 2; mask; mask /= 2) {
    const unsigned high = fm_wave_xor((unsigned)(key >> 32), mask), low = fm_wave_xor((unsigned)key, mask);
    const Key other = (Key)high << 32 | low;
    if (other > key) key = other;
  }
  return key;
}

// Neighbours of which the best is taken: at least 2 K of them should be there, and K must.
FM_DEV constexpr int neighbours(int experts, int k) {
  int lanes = 32;
  while (lanes > 1 && experts / lanes < 2 * k) lanes /= 2;
  return lanes;
}

}  // namespace choosing

template <int E, int K>
struct Choice {
  static constexpr int kLanes = choosing::neighbours(E, K);
  static constexpr int kPadded = (E + FM_WAVE - 1) / FM_WAVE * FM_WAVE, kHeads = kPadded / kLanes;
  choosing::Key keys[kPadded];
  choosing::Key heads[kHeads];  // the best of each kLanes keys
  choosing::Key close[kPadded];  // those that may be among the K best, in any order
  choosing::Key least;
  unsigned n_close;
  choosing::Key chosen[K];  // in order
};

// Writes to c.close all keys that are not below the K-th of the heads.
template <int E, int K>
FM_DEV void find_close(const float* scores, Choice<E, K>& c) {
  using namespace choosing;
  using C = Choice<E, K>;
  const int thread = threadIdx.x, threads = blockDim.x;
  if (thread == 0) c.n_close = 0;
  for (int i = thread; i < C::kPadded; i += threads) {
    const Key key = i < E ? key_of(scores[i], i) : 0;
    const Key best = best_of_lanes<C::kLanes>(key);
    c.keys[i] = key;
    if (i % C::kLanes == 0) c.heads[i / C::kLanes] = best;
  }
  fm_barrier();
  for (int i = thread; i < C::kHeads; i += threads)
    if (c.heads[i] && rank_of(c.heads[i], c.heads, C::kHeads) == K - 1) c.least = c.heads[i];
  fm_barrier();
  for (int i = thread; i < E; i += threads)
    if (c.keys[i] >= c.least) c.close[fm_atomic_add(&c.n_close, 1)] = c.keys[i];
  fm_barrier();
}

// Writes the ids of the K best of `scores` float [E] in ascending order and their float weights.
//
// All threads of a one-dimensional group of whole waves, at least K, take part. `ids` and `weights`
// may be shared memory or the group's own global memory; a barrier has passed when it returns.
template <int E, int K>
FM_DEV void choose(const float* scores, Choice<E, K>& c, int* ids, float* weights) {
  static_assert(K <= E, "more experts are wanted than there are");
  using namespace choosing;
  const int thread = threadIdx.x;
  find_close<E, K>(scores, c);
  for (int i = thread; i < (int)c.n_close; i += blockDim.x) {
    const int rank = rank_of(c.close[i], c.close, c.n_close);
    if (rank < K) c.chosen[rank] = c.close[i];
  }
  fm_barrier();
  if (thread < K) {
    const Key key = c.chosen[thread];
    const float top = score_of(c.chosen[0]);
    float total = 0.0f;
    int place = 0;
    for (int j = 0; j < K; ++j) {
      total += fm_exp(score_of(c.chosen[j]) - top);
      place += id_of(c.chosen[j]) < id_of(key) ? 1 : 0;
    }
    ids[place] = id_of(key);
    weights[place] = fm_exp(score_of(key) - top) / total;
  }
  fm_barrier();
}
