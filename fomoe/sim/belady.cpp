#include "belady.h"

#include <algorithm>

namespace fomoe::sim {

void Belady::find_next(const int32_t* ids, int64_t tokens, int64_t k, const bool* scored) {
  next_.resize(tokens * k);
  std::fill(next_of_.begin(), next_of_.end(), -1);
  for (int64_t t = tokens - 1; t >= 0; --t)
    for (int64_t i = 0; i < k; ++i) {
      int32_t& next = next_of_[ids[t * k + i]];
      // To have an expert at an event that does not count is worth nothing.
      next_[t * k + i] = next >= 0 && scored[next] ? next : -1;
      next = int32_t(t);
    }
}

int64_t Belady::run(const int32_t* ids, int64_t tokens, int64_t k, const bool* scored,
                    int64_t capacity, bool* missed) {
  find_next(ids, tokens, k, scored);
  std::fill(until_.begin(), until_.end(), -1);
  held_.clear();
  int64_t live = 0, misses = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const int32_t *const picks = ids + t * k, *const next = next_.data() + t * k;
    for (int64_t i = 0; i < k; ++i) {
      const bool is_held = until_[picks[i]] == t;
      live -= is_held;
      missed[t * k + i] = scored[t] && !is_held;
      misses += missed[t * k + i];
      until_[picks[i]] = next[i];
      if (next[i] < 0) continue;
      held_.emplace_back(next[i], picks[i]);
      std::push_heap(held_.begin(), held_.end());
      ++live;
    }
    // Entries of past events stay in the heap, below all that are alive.
    for (; live > capacity; --live) {
      until_[held_.front().second] = -1;
      std::pop_heap(held_.begin(), held_.end());
      held_.pop_back();
    }
  }
  return misses;
}

}  // namespace fomoe::sim
