// A layer step in waves that fit the slots: from router scores to what is sent to the device and to
// storage. waves.py has the contract, tests/engine/test_waves.py the same steps in Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "ahead.h"
#include "fomoe/native/view.h"
#include "fomoe/residency/logical.h"
#include "fomoe/residency/planner.h"
#include "fomoe/routing/groups.h"
#include "fomoe/routing/router.h"
#include "segment.h"
#include "vram.h"

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
  int64_t prefetch_issued, nvme_bytes, ram_bytes, demoted_bytes, guesses_used;
  int64_t background_reads, background_bytes;
  int64_t computed_in_ram, guesses_read;
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
  Copy* copies;                              // [4 E]
  const int32_t* arm;                        // [k + 1]
  Counts* counts;
};

struct WaveShape {
  int64_t max_tokens, top_k, budget_permille;
  int32_t demand, prefetch, background;  // priorities of reads
};

class WavePlanner {
 public:
  // `vram` has an entry for each node, none for one of cpu devices.
  WavePlanner(residency::Planner& planner, std::vector<Segment> segments,
              std::vector<std::optional<VramSlots>> vram, WaveArrays arrays, AheadArrays ahead,
              WaveShape shape);

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
  // Writes the experts of a step of one token and their weights, by ascending id.
  void picks(int32_t* ids, float* weights) const {
    for (int64_t i = 0; i < n_experts_; ++i) {
      ids[i] = grouped_[i];
      weights[i] = a_.weights[ranks_[i]];
    }
  }
  // Plans as many experts as fit; returns the number of reads. Ranges over the step's experts.
  int64_t wave();
  // Asks for experts of the layer that were wanted and did not run, behind `reads` others; nothing
  // waits for them until they are wanted again. Returns the number of all reads.
  int64_t read_later(int32_t layer, const int32_t* experts, int64_t n, int64_t reads);
  // Begins a call: it has neither counted nor ordered anything.
  void clear() {
    *a_.counts = {};
    step_copies_ = ahead_copies_ = 0;
  }
  // A device has answered for its last wave: all of it is done, or it was given up.
  void answered(int32_t device, bool aborted);
  // Whether a step of the layer has to wait until devices have answered: what they are at holds
  // slots of the segment that it may need.
  bool is_tight(int32_t layer) const;
  // The device has answered for a record of an ahead list.
  void ended(const Copy& copy);
  // Asks for what a layer `depth` + 1 further on will want for sure enough; returns the number of
  // reads.
  int64_t look_ahead(int32_t layer, int32_t depth, const float* scores, int64_t tokens);

  // Takes back what was guessed for the layer of the last step, and not wanted: CANCELs for copies
  // whose device has not answered, of experts that RAM has as well.
  void give_up_guesses();

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
  int64_t n_devices() const { return int64_t(open_.size()); }
  int64_t step_copies() const { return step_copies_; }
  int64_t ahead_copies() const { return ahead_copies_; }

 private:
  void group(int64_t tokens);
  void arrange(int64_t tokens);
  void choose_arm(int64_t tokens);
  int64_t fitting(int64_t n);
  int64_t fitting(const VramSlots& vram, int64_t n) const;
  int64_t plan(const int32_t* experts, int64_t n);
  void count(const int32_t* experts, int64_t n, int64_t fetches);
  Read* fetch(int32_t layer, int64_t fetches, bool ahead, Read* reads);
  Read* move(const VramSlots& vram, int32_t layer, int64_t fetches, bool ahead, Read* reads);
  Read* prove(const int32_t* experts, int64_t n, Read* reads);
  Read* demand(const VramSlots& vram, const int32_t* experts, int64_t n, uint64_t ticket,
               Read* reads);
  int64_t ahead_room(int32_t layer, int64_t n) const;
  const VramSlots* vram(int32_t layer) const {
    const std::optional<VramSlots>& slots = vram_[a_.layer_node[layer]];
    return slots ? &*slots : nullptr;
  }
  Entry locate(int32_t expert) const;
  std::vector<Copy>& open(int32_t layer) { return open_[a_.layer_device[layer]]; }
  void address(Read* first, Read* end, int32_t priority);

  residency::Planner& planner_;
  const std::vector<Segment> segments_;
  const std::vector<std::optional<VramSlots>> vram_;  // by node
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
  std::vector<int32_t> in_ram_;  // of the wave, those computed in RAM
  std::vector<uint8_t> stays_;   // [E], whether the step computes it in RAM if it lies there
  std::vector<std::vector<Copy>> open_;  // by device, what its answer to the last wave ends
  StepArrays out_{};
  int32_t layer_ = 0;
  int64_t room_ = 0, first_ = 0, end_ = 0, n_experts_ = 0;
  int64_t step_copies_ = 0, ahead_copies_ = 0;
};

}  // namespace fomoe::engine
