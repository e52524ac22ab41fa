// The offline optimum of a cache that may bypass; belady.py has the contract and the proof.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace fomoe::sim {

class Belady {
 public:
  explicit Belady(int64_t n_experts) : until_(n_experts), next_of_(n_experts) {}

  // Events ids [tokens, k], each k distinct experts, of which `scored` [tokens] count; marks in
  // `missed` [tokens, k] which of the scored ones must be read. Returns how many.
  int64_t run(const int32_t* ids, int64_t tokens, int64_t k, const bool* scored, int64_t capacity,
              bool* missed);

 private:
  void find_next(const int32_t* ids, int64_t tokens, int64_t k, const bool* scored);

  std::vector<int32_t> until_;    // [E], the event that a held expert is kept for, -1: not held
  std::vector<int32_t> next_of_;  // [E], scratch
  std::vector<int32_t> next_;     // [tokens, k], the next event of each pick, -1: none that counts
  std::vector<std::pair<int32_t, int32_t>> held_;  // heap of (event, expert), farthest first
};

}  // namespace fomoe::sim
