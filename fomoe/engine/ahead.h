// How sure guesses of the next layers' experts were so far, and the bytes that they may waste.
// ahead.py has the contract.
#pragma once

#include <cstdint>
#include <vector>

#include "fomoe/native/view.h"

namespace fomoe::engine {

constexpr int32_t kDepths = 2, kLevels = 8;

// Arrays that the planner shares with Python; see AheadArrays in ahead.py.
struct AheadArrays {
  View<int64_t> named, wanted;  // [depths, levels]
  View<bool> allowed;           // [depths, levels]
  View<bool> charged;           // [L, E]
  int64_t* misses;              // [1]
  int64_t* credit;              // [1], bytes
};

class Ahead {
 public:
  Ahead(int64_t n_layers, AheadArrays arrays, int64_t budget_permille)
      : a_(arrays), budget_permille_(budget_permille), open_(n_layers) {}

  // The level of a margin: 0 below 1/256, one more with each power of two.
  static int32_t level(float margin) {
    int32_t level = 0;
    for (float edge = 1.0f / 256; level + 1 < kLevels && margin >= edge; edge *= 2) ++level;
    return level;
  }

  // Takes note of a guess about an expert that no tier holds; returns whether it is worth a read
  // of `nbytes` beside `reads` others of that size.
  bool note(int32_t layer, int32_t expert, int32_t level, int32_t depth, int64_t nbytes,
            int64_t reads);

  // As note(), of an expert in RAM whose copy into VRAM would be early: worth it where such copies
  // were wanted at least every third time: in vain they cost a link that often has nothing to do.
  bool note_copy(int32_t layer, int32_t expert, int32_t level, int32_t depth);

  // Scores the layer's guesses against the experts of its step.
  void score(int32_t layer, const int32_t* ids, int64_t n);
  // Experts in RAM that the guesses scored last named, and the step did not want.
  const std::vector<int32_t>& in_vain() const { return in_vain_; }

  // A guess is being read.
  void spend(int32_t layer, int32_t expert, int64_t nbytes) {
    a_.charged.row(layer)[expert] = true;
    *a_.credit -= kCharge * nbytes;
  }
  // A wanted expert is read now, or a guess of it was; returns whether it was.
  bool earn(int32_t layer, int32_t expert, int64_t nbytes, bool is_there);

 private:
  // A guess in vain costs its own read and at worst that of what made room for it.
  static constexpr int64_t kCharge = 2;
  struct Guess {
    int32_t expert, level, depth;
    bool is_copy;
  };
  struct Tally {
    int64_t named = 0, wanted = 0;
  };

  const AheadArrays a_;
  const int64_t budget_permille_;
  std::vector<std::vector<Guess>> open_;  // by layer
  std::vector<int32_t> in_vain_;
  Tally copies_[kDepths][kLevels];
};

}  // namespace fomoe::engine
