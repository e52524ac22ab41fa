// (token, expert) pairs of a route grouped by expert: a counting sort.
#pragma once

#include <cstdint>
#include <vector>

namespace fomoe::routing {

// What group() writes; room for P = tokens * k everywhere, P + 1 in pair_start.
struct Groups {
  int32_t* experts;
  int32_t* pair_start;
  int32_t* pair_token;
  int32_t* order;
  int32_t* ranks;
};

// Keeps its scratch from call to call; it grows to the greatest id and token count seen.
class Grouper {
 public:
  // ids [tokens, k], distinct in a row, below n_experts. Returns the number of experts, ascending.
  int64_t group(const int32_t* ids, int64_t tokens, int64_t k, int64_t n_experts, Groups out);

 private:
  std::vector<int32_t> next_;    // by expert: where its next pair goes
  std::vector<int32_t> filled_;  // by token: how many of its pairs have been met
  std::vector<int32_t> by_expert_;
};

}  // namespace fomoe::routing
