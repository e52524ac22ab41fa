#include "router.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace fomoe::routing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// e^x for x <= 0, to about an ulp; 0 below -87, where float32 runs out of normal numbers.
// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r by Taylor's series (the next term is below 6e-9).
inline float exp_negative(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  constexpr float kLeast = -87.0f;
  const float clamped = x > kLeast ? x : kLeast;
  const float shifted = clamped * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;
  float y = 1.0f / 5040.0f;
  y = y * r + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  int32_t power, bits;
  std::memcpy(&power, &shifted, 4);
  std::memcpy(&bits, &kRound, 4);
  power = (power - bits + 127) * (1 << 23);
  float scale;
  std::memcpy(&scale, &power, 4);
  return x >= kLeast ? y * scale : 0.0f;
}

}  // namespace

bool peak_of(const float* scores, int64_t n, float* peak) {
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, -kInfinity);
  int32_t broken[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const float s = scores[i + j];
      broken[j] |= !(s < kInfinity);  // true of NaN, too
      lanes[j] = s > lanes[j] ? s : lanes[j];
    }
  bool is_broken = false;
  float greatest = -kInfinity;
  for (; i < n; ++i) {
    is_broken |= !(scores[i] < kInfinity);
    greatest = std::max(greatest, scores[i]);
  }
  for (int j = 0; j < kLanes; ++j) {
    is_broken |= broken[j] != 0;
    greatest = std::max(greatest, lanes[j]);
  }
  *peak = greatest;
  return !is_broken && greatest > -kInfinity;
}

void softmax_row(const float* scores, int64_t n, float peak, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = exp_negative(scores[i] - peak);
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += out[i + j];
  for (int j = 0; i < n; ++i, ++j) lanes[j] += out[i];
  for (int half = kLanes / 2; half; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  const float sum = lanes[0];
  for (i = 0; i < n; ++i) out[i] /= sum;
}

void select_best(const float* scores, int64_t n, int64_t k, float* best, int32_t* ids) {
  int64_t held = 0;
  const auto insert = [&](float s, int32_t id) {
    int64_t at = held < k ? held++ : k - 1;
    for (; at > 0 && best[at - 1] < s; --at) {
      best[at] = best[at - 1];
      ids[at] = ids[at - 1];
    }
    best[at] = s;
    ids[at] = id;
  };
  int64_t i = 0;
  for (; i < k; ++i) insert(scores[i], int32_t(i));
  // Later ids must be greater than the least one held: at equal scores the earlier id stays.
  for (; i + kLanes <= n; i += kLanes) {
    int32_t any = 0;
    const float least = best[k - 1];
    for (int j = 0; j < kLanes; ++j) any |= scores[i + j] > least;
    if (!any) continue;
    for (int j = 0; j < kLanes; ++j)
      if (scores[i + j] > best[k - 1]) insert(scores[i + j], int32_t(i + j));
  }
  for (; i < n; ++i)
    if (scores[i] > best[k - 1]) insert(scores[i], int32_t(i));
}

bool Router::route(const float* scores, int32_t* ids, float* weights) {
  float peak;
  if (!peak_of(scores, n_, &peak)) return false;
  softmax_row(scores, n_, peak, p_.data());
  select_best(scores, n_, k_, best_.data(), ids);
  float sum = 0.0f;
  for (int64_t i = 0; i < k_; ++i) sum += p_[ids[i]];
  for (int64_t i = 0; i < k_; ++i) weights[i] = p_[ids[i]] / sum;
  return true;
}

int64_t Router::predict(const float* scores, int64_t rows, int32_t* ids, float* margins) {
  const int64_t held = std::min(k_ + 1, n_);
  margins_.assign(n_, 0.0f);
  is_chosen_.assign(n_, 0);
  int64_t count = 0;
  for (int64_t t = 0; t < rows; ++t) {
    const float* const row = scores + t * n_;
    float peak;
    if (!peak_of(row, n_, &peak)) return -1 - t;
    softmax_row(row, n_, peak, p_.data());
    select_best(row, n_, held, best_.data(), ids);
    const float next = held > k_ ? p_[ids[k_]] : 0.0f;
    float sum = 0.0f;
    for (int64_t i = 0; i < k_; ++i) sum += p_[ids[i]];
    for (int64_t i = 0; i < k_; ++i) {
      const int32_t e = ids[i];
      margins_[e] = std::max(margins_[e], (p_[e] - next) / sum);
      is_chosen_[e] = 1;
    }
  }
  for (int32_t e = 0; e < n_; ++e)
    if (is_chosen_[e]) ids[count++] = e;
  std::sort(ids, ids + count, [&](int32_t a, int32_t b) {
    return margins_[a] != margins_[b] ? margins_[a] > margins_[b] : a < b;
  });
  for (int64_t i = 0; i < count; ++i) margins[i] = margins_[ids[i]];
  return count;
}

}  // namespace fomoe::routing
