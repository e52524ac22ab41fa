// Which slot of a node's segment holds which expert's bytes; see SegmentSlots in transfers.py.
#pragma once

#include <cstdint>

#include "fomoe/native/view.h"
#include "fomoe/residency/planner.h"

namespace fomoe::engine {

// As READ of transfers.py.
struct Read {
  int64_t address;
  uint64_t generation;
  int32_t slot, layer, expert, priority, bell, reserved;
};

// As ENTRY of transfers.py.
struct Entry {
  int64_t address;
  uint64_t generation;
  int32_t slot, expert;
};

// The arrays of a SegmentSlots.
struct Segment {
  View<int32_t> slot_of;  // [L, E]
  int64_t* holder;        // [slots], layer * E + expert at class_first + RAM slot, -1 for none
  const int32_t* layer_class;
  const int32_t* class_first;
  int32_t* free_count;
  int32_t* free_slots;
  uint64_t* generation;
  const int64_t* address;

  // Follows a plan: frees what no tier holds any more, appends the reads it needs; returns their
  // end. The residency is in its state after the plan.
  Read* apply(const residency::Planner& planner, int32_t layer, int64_t fetches, Read* reads) const;

  // The read that brought the expert, or will.
  void locate(int32_t layer, int32_t expert, Entry* out) const {
    const int32_t slot = slot_of.row(layer)[expert];
    *out = {address[slot], generation[slot], slot, expert};
  }

  // A RAM slot of the residency, in the class of `layer`, changes hands; returns who had it.
  int64_t exchange(int32_t layer, int32_t ram_slot, int32_t new_layer, int32_t expert) const;
  // A free slot, of the class of `layer`, for a read of the expert.
  Read assign(int32_t layer, int32_t expert) const;
  void give_back(int32_t layer, int32_t slot) const {
    const int32_t c = layer_class[layer];
    free_slots[class_first[c] + free_count[c]++] = slot;
  }

 private:
  void drop(const residency::Planner& planner, int32_t layer, int32_t expert) const;
};

}  // namespace fomoe::engine
