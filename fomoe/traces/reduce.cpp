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

// Keys of the best candidates and a few more, in any order: those of the bins, by distance from the
// peak, that hold the first c_. Any width of a bin is right; the narrower, the less there is to sort.
int64_t Reducer::collect(const float* scores, float peak) {
  constexpr float kBinsPerNat = 16.0f, kLastBin = kBins - 1;
  int32_t counts[kBins] = {};
  for (int64_t e = 0; e < n_; ++e) {
    const float distance = (peak - scores[e]) * kBinsPerNat;
    bins_[e] = uint8_t(distance < kLastBin ? distance : kLastBin);
  }
  for (int64_t e = 0; e < n_; ++e) ++counts[bins_[e]];
  int32_t last = 0;
  for (int64_t held = counts[0]; held < c_; held += counts[++last]) continue;
  int64_t found = 0;
  for (int64_t e = 0; e < n_; ++e) {
    keys_[found] = sort_key(scores[e], uint32_t(e));
    found += bins_[e] <= last;
  }
  return found;
}

bool Reducer::reduce(const float* scores, uint16_t* ids, float* probabilities, float* tail) {
  float peak;
  if (!routing::peak_of(scores, n_, &peak)) return false;
  routing::softmax_row(scores, n_, peak, p_.data());
  const int64_t found = collect(scores, peak);
  std::sort(keys_.begin(), keys_.begin() + found, std::greater<>());
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
