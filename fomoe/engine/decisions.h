// The combined decision of a layer: rows of scores to experts, by a rule and logical caches.
#pragma once

#include <cstdint>
#include <vector>

#include "fomoe/residency/logical.h"
#include "fomoe/routing/rules.h"

namespace fomoe::engine {

// Columns of a row's tally.
enum Tally : int32_t { kReads, kBackground, kSubstituted, kTallies };

// Where decisions go, [rows, k] each but for `lost` [rows] and `tally` [rows, kTallies]; see
// Decisions in decisions.py.
struct DecisionArrays {
  int32_t* ids;
  float* weights;
  bool* substituted;
  bool* read;
  int32_t* wanted;
  int32_t* background;
  float* lost;
  int64_t* tally;

  DecisionArrays at(int64_t row, int64_t k) const {
    return {ids + row * k,    weights + row * k,    substituted + row * k, read + row * k,
            wanted + row * k, background + row * k, lost + row, tally + row * kTallies};
  }
};

// What decisions read, by row; prices may be null: the rule's own.
struct DecisionInputs {
  const int32_t* sequences;
  const float* prices;
  const float* scores;  // [rows, width]
  const int32_t* ids;   // [rows, width] of heads, null where rows hold the scores of all experts
  int64_t rows, width;

  const float* row(int64_t i) const { return scores + i * width; }
};

class Decider {
 public:
  // `own` has room for a row of each sequence.
  Decider(const residency::LogicalCaches& caches, routing::Rule rule, int64_t k, int64_t threads,
          DecisionArrays own);

  // Decides one token of a layer for each row; returns the first row that is not finite, with
  // nothing decided, or -1.
  int64_t decide(int64_t layer, const DecisionInputs& in, const DecisionArrays& out);

  const residency::LogicalCaches& caches() const { return caches_; }
  const routing::Rule& rule() const { return rule_; }
  int64_t k() const { return k_; }
  const DecisionArrays& own() const { return own_; }

 private:
  struct Worker {
    routing::RuleRouter router;
    residency::LogicalCaches::Scratch scratch;
  };

  void decide_rows(int64_t layer, const DecisionInputs& in, const DecisionArrays& out,
                   int64_t worker);
  void decide_row(int64_t layer, int64_t sequence, float strength, const DecisionArrays& out,
                  Worker& worker);

  const residency::LogicalCaches caches_;
  const routing::Rule rule_, exact_;
  const int64_t k_;
  const DecisionArrays own_;
  std::vector<Worker> workers_;
};

}  // namespace fomoe::engine
