#include "reduce.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "fomoe/routing/router.h"

namespace fomoe::traces {
namespace {

// All keys of a row differ; a greater key is a greater score or, at equal scores, a lower id.
inline uint64_t sort_key(float score, uint32_t id) {
  const float positive_zero = score + 0.0f;  // -0.0 equals 0.0
  uint32_t bits;
  std::memcpy(&bits, &positive_zero, 4);
  bits ^= bits >> 31 ? 0xFFFFFFFFu : 0x80000000u;
  return uint64_t(bits) << 32 | (0xFFFFFFFFu - id);
}

}  // namespace

bool Reducer::reduce(const float* scores, uint16_t* ids, float* probabilities, float* tail) {
  float peak;
  if (!routing::peak_of(scores, n_, &peak)) return false;
  routing::softmax_row(scores, n_, peak, p_.data());
  for (int64_t e = 0; e < n_; ++e) keys_[e] = sort_key(scores[e], uint32_t(e));
  const auto first = keys_.begin(), end = first + c_;
  if (c_ < n_) std::nth_element(first, end, keys_.end(), std::greater<>());
  std::sort(first, end, std::greater<>());
  for (int64_t i = 0; i < c_; ++i) {
    const uint32_t id = 0xFFFFFFFFu - uint32_t(keys_[i]);
    ids[i] = uint16_t(id);
    probabilities[i] = p_[id];
    p_[id] = 0.0f;
  }
  double rest = 0.0;
  for (int64_t e = 0; e < n_; ++e) rest += p_[e];
  *tail = float(rest);
  return true;
}

}  // namespace fomoe::traces
