#include "rules.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "router.h"

namespace fomoe::routing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

float Rule::limit_of(int64_t layer, float strength) const {
  if (sensitivities.empty()) return strength;
  const float s = sensitivities[layer];
  return kind == RuleKind::kDrop ? strength / std::sqrt(s) : strength / s;
}

RuleRouter::RuleRouter(int64_t n_experts, int64_t k)
    : n_(n_experts),
      k_(k),
      p_(n_experts),
      best_(k),
      masked_(n_experts),
      ids_(k),
      top_p_(k),
      offer_ids_(k),
      offer_p_(k),
      missing_(k),
      is_wanted_(n_experts) {}

bool RuleRouter::rank(const float* scores) {
  float peak;
  if (!peak_of(scores, n_, &peak)) return false;
  softmax_row(scores, n_, peak, p_.data());
  select_best(scores, n_, k_, best_.data(), ids_.data());
  sum_ = 0.0f;
  for (int64_t i = 0; i < k_; ++i) sum_ += top_p_[i] = p_[ids_[i]];
  scores_ = scores;
  return true;
}

void RuleRouter::rank(const int32_t* ids, const float* probabilities, int64_t count) {
  std::copy(ids, ids + k_, ids_.begin());
  std::copy(probabilities, probabilities + k_, top_p_.begin());
  sum_ = 0.0f;
  for (int64_t i = 0; i < k_; ++i) sum_ += top_p_[i];
  scores_ = nullptr;
  head_ids_ = ids;
  head_p_ = probabilities;
  head_count_ = count;
}

Outcome RuleRouter::choose(const Rule& rule, float limit, const bool* resident, Choice out) {
  Outcome o;
  for (int64_t i = 0; i < k_; ++i) {
    out.ids[i] = ids_[i];
    out.weights[i] = top_p_[i] / sum_;
    out.substituted[i] = false;
  }
  if (rule.kind == RuleKind::kCacheAware) cache_aware(rule, limit, resident, out, &o);
  if (rule.kind == RuleKind::kPrice) price(rule, limit, resident, out, &o);
  if (rule.kind == RuleKind::kDrop) drop(rule, limit, resident, out, &o);
  if (o.substituted || o.dropped) give_back(rule, out, &o);
  return o;
}

// The best resident experts outside the top-k, at most `most` of them.
RuleRouter::Offers RuleRouter::offers(const bool* resident, int64_t most) {
  if (scores_) {
    offers_of_scores(resident, most);
    const int64_t found = std::find(offer_ids_.begin(), offer_ids_.begin() + most, -1) -
                          offer_ids_.begin();
    return {offer_ids_.data(), offer_p_.data(), found};
  }
  int64_t count = 0;
  for (int64_t i = k_; i < head_count_ && count < most; ++i) {
    if (!resident[head_ids_[i]]) continue;
    offer_ids_[count] = head_ids_[i];
    offer_p_[count++] = head_p_[i];
  }
  return {offer_ids_.data(), offer_p_.data(), count};
}

void RuleRouter::offers_of_scores(const bool* resident, int64_t most) {
  for (int64_t e = 0; e < n_; ++e) masked_[e] = resident[e] ? scores_[e] : -kInfinity;
  for (int64_t i = 0; i < k_; ++i) masked_[ids_[i]] = -kInfinity;
  select_best(masked_.data(), n_, most, best_.data(), offer_ids_.data());
  int64_t count = 0;
  while (count < most && best_[count] > -kInfinity) ++count;
  // Experts that the router itself scores -inf come last; the mask hides them among the absent.
  if (count < most) {
    for (int64_t i = 0; i < k_; ++i) is_wanted_[ids_[i]] = true;
    for (int32_t e = 0; e < n_ && count < most; ++e)
      if (resident[e] && !is_wanted_[e] && scores_[e] == -kInfinity) offer_ids_[count++] = e;
    for (int64_t i = 0; i < k_; ++i) is_wanted_[ids_[i]] = false;
  }
  for (int64_t i = 0; i < count; ++i) offer_p_[i] = p_[offer_ids_[i]];
  if (count < most) offer_ids_[count] = -1;
}

void RuleRouter::cache_aware(const Rule& rule, float limit, const bool* resident, Choice out,
                             Outcome* o) {
  int64_t misses = 0;
  for (int32_t i = 0; i < k_; ++i)
    if (!resident[ids_[i]]) missing_[misses++] = i;
  if (!misses || limit > 1.0f) return;
  const Offers offer = offers(resident, misses);
  for (int64_t j = 0; j < misses && o->substituted < std::min(offer.count, rule.budget); ++j) {
    const int32_t rank = missing_[j];
    const float p = offer.p[o->substituted];
    if (!(p >= limit * top_p_[rank])) continue;
    out.ids[rank] = offer.ids[o->substituted++];
    out.weights[rank] = p / sum_;
    out.substituted[rank] = true;
  }
}

void RuleRouter::price(const Rule& rule, float limit, const bool* resident, Choice out,
                       Outcome* o) {
  int64_t misses = 0;
  for (int64_t i = k_ - 1; i >= rule.guarded; --i)  // lightest first
    if (!resident[ids_[i]]) missing_[misses++] = int32_t(i);
  // The best k of values that fall along both lists: offers enter while the best of them is worth
  // more than the least of the missing; at equal values the router's own choice stays.
  if (!misses || !(limit > 0.0f)) return;
  const Offers offer = offers(resident, misses);
  int64_t swaps = 0;
  while (swaps < offer.count && offer.p[swaps] / sum_ > out.weights[missing_[swaps]] - limit)
    ++swaps;
  for (int64_t j = 0; j < swaps; ++j) out.ids[missing_[j]] = -1;
  int64_t at = 0;
  for (int64_t i = 0; i < k_; ++i) {
    if (out.ids[i] < 0) continue;
    out.weights[at] = out.weights[i];
    out.ids[at++] = out.ids[i];
  }
  for (int64_t j = 0; j < swaps; ++j, ++at) {
    out.ids[at] = offer.ids[j];
    out.weights[at] = offer.p[j] / sum_;
    out.substituted[at] = true;
  }
  o->substituted = swaps;
}

void RuleRouter::drop(const Rule& rule, float limit, const bool* resident, Choice out,
                      Outcome* o) {
  for (int64_t i = rule.guarded; i < k_; ++i) {
    if (resident[ids_[i]] || out.weights[i] >= limit) continue;
    out.ids[i] = -1;
    out.weights[i] = 0.0f;
    ++o->dropped;
  }
}

void RuleRouter::give_back(const Rule& rule, Choice out, Outcome* o) const {
  float sum = 0.0f;
  for (int64_t i = 0; i < k_; ++i) sum += out.weights[i];
  o->lost = std::max(1.0f - sum, 0.0f);
  if (!(rule.kappa > 0.0f) || !(sum > 0.0f)) return;
  const float factor = 1.0f + rule.kappa * o->lost / sum;
  for (int64_t i = 0; i < k_; ++i) out.weights[i] *= factor;
}

}  // namespace fomoe::routing
