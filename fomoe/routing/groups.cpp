#include "groups.h"

namespace fomoe::routing {

int64_t Grouper::group(const int32_t* ids, int64_t tokens, int64_t k, int64_t n_experts,
                       Groups out) {
  const int64_t pairs = tokens * k;
  next_.assign(n_experts, 0);
  for (int64_t p = 0; p < pairs; ++p) ++next_[ids[p]];
  int64_t count = 0;
  int32_t start = 0;
  for (int64_t e = 0; e < n_experts; ++e) {
    const int32_t size = next_[e];
    next_[e] = start;
    out.experts[count] = int32_t(e);
    out.pair_start[count] = start;
    count += size > 0;
    start += size;
    if (count == pairs) break;
  }
  out.pair_start[count] = start;
  by_expert_.resize(pairs);
  for (int64_t p = 0; p < pairs; ++p) by_expert_[next_[ids[p]]++] = int32_t(p);
  filled_.assign(tokens, 0);
  for (int64_t i = 0; i < pairs; ++i) {
    const int32_t pair = by_expert_[i];
    const int32_t token = int32_t(pair / k), rank = int32_t(pair % k);
    const int64_t at = token * k + filled_[token]++;
    out.pair_token[i] = token;
    out.order[at] = int32_t(i);
    out.ranks[at] = rank;
  }
  return count;
}

}  // namespace fomoe::routing
