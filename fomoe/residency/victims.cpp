#include "victims.h"

#include <algorithm>

namespace fomoe::residency {

constexpr double kFollowed = 4294967296.0;  // above every worth; a sum is exact to 2^-20

void LruWorth::values(const History& history, int32_t layer, const int32_t* experts, int64_t n,
                      double* out) {
  const int64_t* const last = history.last.row(layer);
  for (int64_t i = 0; i < n; ++i) out[i] = double(last[experts[i]]);
}

void LfruWorth::values(const History& history, int32_t layer, const int32_t* experts, int64_t n,
                       double* out) {
  const int64_t *const uses = history.uses.row(layer), *const last = history.last.row(layer);
  const int64_t next = history.steps[layer] + 1;
  for (int64_t i = 0; i < n; ++i)
    out[i] = double(uses[experts[i]]) / double(next - last[experts[i]]);
}

VictimQueue::VictimQueue(const State& state, const Table& table, const History& history,
                         const Followed& followed)
    : state_(state),
      table_(table),
      history_(history),
      followed_(followed),
      entries_(int64_t(state.n_layers) * state.n_experts),
      left_(state.n_layers, -1),
      experts_(state.n_experts),
      values_(state.n_experts),
      nothing_(state.n_experts, 0),
      tried_(state.n_layers, 0) {}

void VictimQueue::begin(Shelter shelter) {
  shelter_ = shelter;
  std::fill(left_.begin(), left_.end(), -1);
}

Victim VictimQueue::peek(int32_t layer, Worth& worth) {
  const Table& t = table_;
  if (t.held[layer] >= t.quota[layer] && ready(layer, worth))
    return {row(layer)->worth, layer, row(layer)->expert};
  const int32_t* const begin = t.members + t.member_start[t.pool[layer]];
  const int32_t* const end = t.members + t.member_start[t.pool[layer] + 1];
  for (const int32_t* m = begin; m < end; ++m) tried_[*m] = 0;
  for (;;) {
    int32_t best = -1;
    for (const int32_t* m = begin; m < end; ++m)
      if (!tried_[*m] && (best < 0 || t.quota[*m] - t.held[*m] < t.quota[best] - t.held[best]))
        best = *m;
    if (best < 0) return {0.0, -1, -1};
    if (ready(best, worth)) return {row(best)->worth, best, row(best)->expert};
    tried_[best] = 1;
  }
}

void VictimQueue::pop(int32_t layer) {
  Entry* const first = row(layer);
  std::pop_heap(first, first + left_[layer]);
  --left_[layer];
}

int64_t VictimQueue::ready(int32_t layer, Worth& worth) {
  if (left_[layer] >= 0) return left_[layer];
  const int64_t n = collect(layer);
  worth.values(history_, layer, experts_.data(), n, values_.data());
  Entry* const first = row(layer);
  const uint8_t* const kept = followed(layer);
  for (int64_t i = 0; i < n; ++i)
    first[i] = {values_[i] + (kept[experts_[i]] ? kFollowed : 0.0), experts_[i]};
  std::make_heap(first, first + n);
  return left_[layer] = n;
}

const uint8_t* VictimQueue::followed(int32_t layer) const {
  if (!followed_.resident) return nothing_.data();
  return reinterpret_cast<const uint8_t*>(followed_.resident) + int64_t(layer) * state_.n_experts;
}

int64_t VictimQueue::collect(int32_t layer) {
  const Flags& f = state_.flags;
  const auto bytes = [](const bool* flags) { return reinterpret_cast<const uint8_t*>(flags); };
  const int32_t* const slots = table_.slot_of.row(layer);
  const uint8_t *const pinned = bytes(f.pinned.row(layer)), *const awaited =
                                                                bytes(f.awaited.row(layer));
  const uint8_t* const wanted =
      shelter_.last_wanted ? bytes(f.last_wanted.row(layer)) : nothing_.data();
  const uint8_t* const guesses =
      shelter_.layer == layer ? bytes(shelter_.guesses) : nothing_.data();
  const uint8_t* const kept = shelter_.last_wanted ? followed(layer) : nothing_.data();
  int64_t n = 0;
  // Without branches: which experts are resident cannot be predicted.
  for (int32_t e = 0; e < state_.n_experts; ++e) {
    experts_[n] = e;
    n += (slots[e] >= 0) & !(pinned[e] | awaited[e] | wanted[e] | guesses[e] | kept[e]);
  }
  return n;
}

}  // namespace fomoe::residency
