#include "segment.h"

#include <initializer_list>

namespace fomoe::engine {

Read* Segment::apply(const residency::Planner& planner, int32_t layer, int64_t fetches,
                     Read* reads) const {
  const residency::Fetch* const plan = planner.fetches();
  for (int64_t i = 0; i < fetches; ++i) {
    const residency::Fetch& f = plan[i];
    // Whoever held such a RAM slot last may now be gone from both tiers, as may the victim.
    const int64_t from_demoted =
        f.demoted_to < 0 ? -1 : exchange(layer, f.demoted_to, f.victim_layer, f.victim);
    const int64_t from_kept = f.kept_in < 0 ? -1 : exchange(layer, f.kept_in, layer, f.expert);
    if (f.victim >= 0) drop(planner, f.victim_layer, f.victim);
    for (const int64_t gone : {from_demoted, from_kept})
      if (gone >= 0) drop(planner, int32_t(gone / slot_of.width), int32_t(gone % slot_of.width));
    if (f.source == residency::kNvme) *reads++ = assign(layer, f.expert);
  }
  return reads;
}

int64_t Segment::exchange(int32_t layer, int32_t ram_slot, int32_t new_layer,
                          int32_t expert) const {
  int64_t& held = holder[class_first[layer_class[layer]] + ram_slot];
  const int64_t displaced = held;
  held = new_layer * slot_of.width + expert;
  return displaced;
}

// Takes the slot back unless a tier holds the expert.
void Segment::drop(const residency::Planner& planner, int32_t layer, int32_t expert) const {
  int32_t& slot = slot_of.row(layer)[expert];
  if (slot < 0 || planner.tier(layer, expert) != residency::kNvme) return;
  give_back(layer, slot);
  slot = -1;
}

Read Segment::assign(int32_t layer, int32_t expert) const {
  const int32_t c = layer_class[layer];
  if (free_count[c] == 0) throw Bug("no slot of the segment is free for a read");
  const int32_t slot = free_slots[class_first[c] + --free_count[c]];
  slot_of.row(layer)[expert] = slot;
  return {address[slot], ++generation[slot], slot, layer, expert, 0, 0, 0};
}

}  // namespace fomoe::engine
