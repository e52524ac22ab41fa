#include "ahead.h"

#include <algorithm>

namespace fomoe::engine {

// What a failed pass left behind is scored by the next one, but must not grow.
constexpr size_t kMostOpen = 256;
constexpr int64_t kWindow = 4096;  // copies after which their tally is halved

bool Ahead::note(int32_t layer, int32_t expert, int32_t level, int32_t depth, int64_t nbytes,
                 int64_t reads) {
  if (open_[layer].size() < kMostOpen) open_[layer].push_back({expert, level, depth, false});
  return a_.allowed.row(depth)[level] && *a_.credit >= kCharge * (reads + 1) * nbytes;
}

bool Ahead::note_copy(int32_t layer, int32_t expert, int32_t level, int32_t depth) {
  if (open_[layer].size() < kMostOpen) open_[layer].push_back({expert, level, depth, true});
  const Tally& tally = copies_[depth][level];
  return 3 * tally.wanted >= tally.named;
}

void Ahead::score(int32_t layer, const int32_t* ids, int64_t n) {
  in_vain_.clear();
  for (const Guess& guess : open_[layer]) {
    const bool is_wanted = std::find(ids, ids + n, guess.expert) != ids + n;
    if (guess.is_copy) {
      Tally& tally = copies_[guess.depth][guess.level];
      if (tally.named == kWindow) tally = {tally.named / 2, tally.wanted / 2};
      ++tally.named;
      tally.wanted += is_wanted;
      if (!is_wanted) in_vain_.push_back(guess.expert);
    } else {
      ++a_.named.row(guess.depth)[guess.level];
      a_.wanted.row(guess.depth)[guess.level] += is_wanted;
    }
  }
  open_[layer].clear();
}

bool Ahead::earn(int32_t layer, int32_t expert, int64_t nbytes, bool is_there) {
  bool& charged = a_.charged.row(layer)[expert];
  const bool was_guessed = charged && is_there;
  charged = false;  // one that left before it was wanted stays paid for
  if (is_there && !was_guessed) return false;
  ++*a_.misses;
  *a_.credit += nbytes * budget_permille_ / 1000 + (was_guessed ? kCharge * nbytes : 0);
  return was_guessed;
}

}  // namespace fomoe::engine
