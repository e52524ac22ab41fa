// A layer step in waves that fit the slots: from router scores to what is sent to the device and to
// storage. waves.py has the contract, tests/engine/test_waves.py the same steps in Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ahead.h"
#include "fomoe/native/view.h"
#include "fomoe/residency/logical.h"
#include "fomoe/residency/planner.h"
#include "fomoe/routing/groups.h"
#include "fomoe/routing/router.h"
#include "segment.h"

namespace fomoe::engine {

// Where a step is written for the device; see StepArrays in _engine.pyi.
struct StepArrays {
  int32_t* order;       // [T, k]
  float* weights;       // [T, k]
  int32_t* pair_token;  // [P]
  int32_t* pair_start;  // [n + 1]
  Entry* entries;       // [n]
  int64_t max_tokens, k, max_experts;
};

// Added up over the activations and reads of one call.
struct Counts {
  int64_t by_tier[3], substitutes[3];
  int64_t prefetch_used, prefetch_issued, nvme_bytes, ram_bytes, demoted_bytes, guesses_used;
  int64_t background_reads, background_bytes;
};

// Arrays that the planner shares with Python; see WaveArrays in waves.py.
struct WaveArrays {
  const int32_t *layer_node, *layer_device;  // [L]
  const int64_t* expert_bytes;               // [L]
  View<int8_t> unproven;                     // [L, E]
  View<bool> background;                     // [L, E]
  int32_t* ids;                              // [T, k]
  float* weights;                            // [T, k]
  int32_t* experts;                          // [E]
  int64_t* pairs;                            // [E]
  Read* reads;                               // [2 E]
  Counts* counts;
};

struct WaveShape {
  int64_t max_tokens, top_k, budget_permille;
  int32_t demand, prefetch, background;  // priorities of reads
};

class WavePlanner {
 public:
  WavePlanner(residency::Planner& planner, std::vector<Segment> segments, WaveArrays arrays,
              AheadArrays ahead, WaveShape shape);

  // Routes [tokens, E] into `ids` and `weights`; returns the first row that is not finite, or -1.
  int64_t route(const float* scores, int64_t tokens);
  // Feeds the routed tokens to their sequence's decision hash.
  void observe(int32_t layer, int64_t tokens, residency::TokenLog log) {
    residency::observe(layer, a_.ids, tokens, shape_.top_k, log);
  }
  // Takes a route that was made elsewhere.
  void take(const int32_t* ids, const float* weights, int64_t pairs) {
    std::copy(ids, ids + pairs, a_.ids);
    std::copy(weights, weights + pairs, a_.weights);
  }
  // Starts a step of the routed tokens; `substituted` [tokens, k] or null.
  void begin(int32_t layer, int64_t tokens, const bool* substituted, const StepArrays& out);
  // Plans as many experts as fit; returns the number of reads. Ranges over the step's experts.
  int64_t wave();
  // Asks for experts of the layer that were wanted and did not run, behind `reads` others; nothing
  // waits for them until they are wanted again. Returns the number of all reads.
  int64_t read_later(int32_t layer, const int32_t* experts, int64_t n, int64_t reads);
  void clear_counts() { *a_.counts = {}; }
  // Asks for what a layer `depth` + 1 further on will want for sure enough; returns the number of
  // reads.
  int64_t look_ahead(int32_t layer, int32_t depth, const float* scores, int64_t tokens);

  // Brings the layer's state near.
  void ask_for(int32_t layer) const {
    state().ask_for(layer);
    segments_[a_.layer_node[layer]].slot_of.ask_for(layer);
  }

  const residency::State& state() const { return planner_.state(); }
  const WaveShape& shape() const { return shape_; }
  int64_t first() const { return first_; }
  int64_t end() const { return end_; }
  int64_t n_experts() const { return n_experts_; }

 private:
  void group(int64_t tokens);
  void arrange(int64_t tokens);
  void count(const int32_t* experts, int64_t n, int64_t fetches);
  Read* fetch(int32_t layer, int64_t fetches, Read* reads);
  Read* prove(const int32_t* experts, int64_t n, Read* reads);
  void address(Read* first, Read* end, int32_t priority);

  residency::Planner& planner_;
  const std::vector<Segment> segments_;
  const WaveArrays a_;
  const WaveShape shape_;
  Ahead ahead_;
  routing::Router router_;
  routing::Grouper grouper_;
  std::vector<int32_t> grouped_, pair_start_, pair_token_, order_, ranks_;  // by ascending expert
  std::vector<int32_t> moved_;   // [P], the served number of each grouped pair
  std::vector<int32_t> sorted_;  // [E], scratch
  std::vector<float> margins_;   // [E], scratch
  std::vector<int8_t> source_;   // [E], scratch
  StepArrays out_{};
  int32_t layer_ = 0;
  int64_t room_ = 0, first_ = 0, end_ = 0, n_experts_ = 0;
};

}  // namespace fomoe::engine
