// The decision hash and the touches of a logical cache; see logical.py.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fomoe::residency {

// One to one and alike on every platform.
// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
inline uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

struct TokenLog {
  int64_t* tokens;  // [L], tokens so far
  uint64_t* hash;
};

// Feeds the hash with the next tokens' experts, ids [tokens, k]; returns the first one's number.
inline int64_t observe(int32_t layer, const int32_t* ids, int64_t tokens, int64_t k, TokenLog log) {
  const int64_t first = log.tokens[layer];
  // A sum does not depend on order, so neither layer-major prefill nor chunks change it.
  uint64_t sum = 0;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < k; ++i)
      sum +=
          splitmix64(uint64_t(first + t) << 32 | uint64_t(layer) << 16 | uint64_t(ids[t * k + i]));
  *log.hash += sum;
  log.tokens[layer] += tokens;
  return first;
}

// Touches the experts of tokens from number `first` on; keys [E] of the layer.
inline void commit(int64_t first, const int32_t* ids, int64_t tokens, int64_t k, int64_t* keys,
                   int64_t n_experts) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < k; ++i) {
      const int64_t id = ids[t * k + i];
      keys[id] = std::max(keys[id], (first + t) * n_experts + id);
    }
}

}  // namespace fomoe::residency
