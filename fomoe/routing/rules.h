// Rules that choose among the experts of one token with an eye on what is resident.
//
// All arithmetic is float32 in the order written here, without fused steps, so that the bits are
// those of fomoe/routing/reference.py on every instruction set; rules.py says what the rules mean.
#pragma once

#include <cstdint>
#include <vector>

namespace fomoe::routing {

enum class RuleKind : int32_t { kExact, kCacheAware, kPrice, kDrop };

struct Rule {
  RuleKind kind = RuleKind::kExact;
  float kappa = 0.0f;     // share of the lost mass that the weights get back
  int64_t guarded = 0;    // kPrice, kDrop: so many top ranks always run
  int64_t budget = 0;     // kCacheAware: most substitutions of a token
  float limit = 0.0f;     // threshold, price or weight; of a layer of sensitivity 1
  std::vector<float> sensitivities;  // by layer, empty: all are 1

  // What `strength` (a limit) comes to in a layer.
  float limit_of(int64_t layer, float strength) const;
};

// What runs, [k] each: best rank first, id -1 for what is dropped.
struct Choice {
  int32_t* ids;
  float* weights;
  bool* substituted;
};

struct Outcome {
  int64_t substituted = 0, dropped = 0;
  float lost = 0.0f;  // mass of the exact top-k that does not run, less what substitutes bring
};

// Routes one token at a time: rank() first, then choose() once or more.
class RuleRouter {
 public:
  RuleRouter(int64_t n_experts, int64_t k);

  int64_t n_experts() const { return n_; }
  int64_t k() const { return k_; }

  // Takes a row of scores [n]. False if it is not finite.
  bool rank(const float* scores);
  // Takes the head of a row: ids and probabilities [count], best first, count >= k. No other
  // expert can become a substitute.
  void rank(const int32_t* ids, const float* probabilities, int64_t count);

  // The exact top-k [k], best first.
  const int32_t* wanted() const { return ids_.data(); }
  // Probabilities [n] of the row of scores last ranked.
  const float* probabilities() const { return p_.data(); }

  Outcome choose(const Rule& rule, float limit, const bool* resident, Choice out);

 private:
  struct Offers {
    const int32_t* ids;
    const float* p;
    int64_t count;
  };

  Offers offers(const bool* resident, int64_t most);
  void offers_of_scores(const bool* resident, int64_t most);
  void cache_aware(const Rule& rule, float limit, const bool* resident, Choice out, Outcome* o);
  void price(const Rule& rule, float limit, const bool* resident, Choice out, Outcome* o);
  void drop(const Rule& rule, float limit, const bool* resident, Choice out, Outcome* o);
  void give_back(const Rule& rule, Choice out, Outcome* o) const;

  int64_t n_, k_;
  const float* scores_ = nullptr;       // of the row, null for a head
  const int32_t* head_ids_ = nullptr;   // of the head, its rest behind the top-k
  const float* head_p_ = nullptr;
  int64_t head_count_ = 0;
  float sum_ = 0.0f;                    // of the top-k's probabilities, by falling rank
  std::vector<float> p_, best_, masked_;
  std::vector<int32_t> ids_;            // [k]
  std::vector<float> top_p_;            // [k]
  std::vector<int32_t> offer_ids_;      // [k], best first
  std::vector<float> offer_p_;          // [k]
  std::vector<int32_t> missing_;        // [k], scratch
  std::vector<uint8_t> is_wanted_;      // [n], scratch; all 0 between calls
};

}  // namespace fomoe::routing
