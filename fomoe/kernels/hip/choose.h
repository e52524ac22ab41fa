// Top-k of router scores by one group: by score descending, then by lower id.
//
// Ranks are counted, in two rounds: within parts of 64 scores, then among the best of the parts.
// A weight is the softmax over all scores, divided by the sum of the chosen ones: the sum over all
// cancels, exp(s - best) / sum over the chosen of exp(s - best) is left.
#pragma once

namespace choosing {

typedef unsigned long long Key;  // greater: chosen earlier

constexpr int kPart = 64;  // scores that are ranked against each other first

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

}  // namespace choosing

// Shared memory of choose(); E scores, K chosen. A key of 0 stands for none.
template <int E, int K>
struct Choice {
  static constexpr int kParts = (E + choosing::kPart - 1) / choosing::kPart;
  static constexpr int kBest = K < choosing::kPart ? K : choosing::kPart;
  choosing::Key keys[kParts * choosing::kPart];
  choosing::Key best[kParts * kBest];  // of each part, in order
  choosing::Key chosen[K];             // in order
};

// Writes the ids of the K best of `scores` float [E] in ascending order and their float weights.
//
// All threads of a one-dimensional group of at least K take part. `ids` and `weights` may be shared
// memory or the group's own global memory; a barrier has passed when it returns.
template <int E, int K>
FM_DEV void choose(const float* scores, Choice<E, K>& c, int* ids, float* weights) {
  static_assert(K <= E, "more experts are wanted than there are");
  using namespace choosing;
  const int thread = threadIdx.x, threads = blockDim.x;
  constexpr int padded = Choice<E, K>::kParts * kPart, kept = Choice<E, K>::kBest;
  for (int i = thread; i < padded; i += threads) c.keys[i] = i < E ? key_of(scores[i], i) : 0;
  fm_barrier();
  for (int i = thread; i < padded; i += threads) {
    const int part = i / kPart;
    const Key key = c.keys[i];
    // Keys of 0 share a rank: they are told apart by their place, so that all places are written.
    const int rank = key ? rank_of(key, c.keys + part * kPart, kPart) : i % kPart;
    if (rank < kept) c.best[part * kept + rank] = key;
  }
  fm_barrier();
  for (int i = thread; i < Choice<E, K>::kParts * kept; i += threads) {
    const Key key = c.best[i];
    const int rank = key ? rank_of(key, c.best, Choice<E, K>::kParts * kept) : K;
    if (rank < K) c.chosen[rank] = key;
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
