// What a node of GPUs has beside its segment: slots in VRAM and copies between the two. copies.py has
// the contract with who executes them, GpuSegment in gpu_segment.py the same rules in Python.
#pragma once

#include <algorithm>
#include <cstdint>

#include "segment.h"

namespace fomoe::engine {

// As CopyKind and Outcome of copies.py. kCompute is never sent: a use of a slot by storage's kernels.
enum CopyKind : int32_t { kDemote = 0, kLoad = 1, kCancel = 2, kCompute = 3 };
enum Outcome : int32_t { kOpen = 0, kDone = 1, kDropped = 2 };
// As Reading of gpu_segment.py.
enum Reading : int8_t { kEnded = 0, kIdle = 1, kDemanded = 2 };

// As COPY of copies.py.
struct Copy {
  int64_t address;
  uint64_t generation, ticket;
  int64_t nbytes;
  int32_t kind, layer, expert, vram, slot, outcome;
};

// The arrays of a GpuSegment.
struct VramArrays {
  int32_t* users;             // [slots], unanswered records that name a slot
  int8_t* reading;            // [slots]
  int64_t* holds;             // [VRAM slots], whose bytes are there, layer * E + expert, or -1
  uint64_t* tickets;          // [VRAM slots], of the last LOAD into each
  const int32_t* pool_first;  // [L], where the layer's pool begins among the VRAM slots
  const int32_t* staging;     // [classes]
  int32_t* ahead;             // [classes], unanswered records of the ahead list
  uint64_t* ticket;           // [1], the last one given out
  const int64_t* expert_bytes;  // [L]
};

class VramSlots {
 public:
  // Where reads and copies are appended.
  struct Out {
    Read* reads;
    Copy* copies;
  };

  VramSlots(const Segment& segment, VramArrays arrays) : s_(segment), a_(arrays) {}

  // Follows a plan: demotions, then reads and loads; returns their ends. The residency is in its
  // state after the plan.
  Out follow(residency::Planner& planner, int32_t layer, int64_t fetches, bool ahead, Out out) const;
  // Orders the expert's bytes into its VRAM slot.
  Copy load(const residency::Planner& planner, int32_t layer, int32_t expert, bool ahead) const;
  // Tells the device that nobody wants an expert any more that it was to bring ahead.
  Copy cancel(int32_t layer, int32_t expert) const;
  // Keeps an expert's slot of the segment while it is computed there.
  Copy compute(int32_t layer, int32_t expert) const;
  // A record was answered; returns whether the residency had to forget its expert.
  bool end(residency::Planner& planner, const Copy& copy, bool ahead, bool done) const;

  // Where an entry of a step finds the expert.
  Entry locate(const residency::Planner& planner, int32_t layer, int32_t expert) const;
  Entry locate_in_ram(int32_t layer, int32_t expert) const;
  bool is_in_vram(const residency::Planner& planner, int32_t layer, int32_t expert) const {
    const int32_t vram = planner.state().device.slot(layer, expert);
    return vram >= 0 && a_.holds[a_.pool_first[layer] + vram] == key(layer, expert);
  }
  // Whether the expert's bytes are in the segment for good: RAM keeps it if its LOAD is given up.
  bool stays_in_ram(const residency::Planner& planner, int32_t layer, int32_t expert) const {
    const int32_t slot = s_.slot_of.row(layer)[expert];
    return slot >= 0 && a_.reading[slot] == kEnded && planner.state().ram.slot(layer, expert) >= 0;
  }
  // Whether the expert's last LOAD was ordered after `ticket`.
  bool is_ordered(const residency::Planner& planner, int32_t layer, int32_t expert,
                  uint64_t ticket) const {
    return a_.tickets[a_.pool_first[layer] + planner.state().device.slot(layer, expert)] > ticket;
  }
  uint64_t ticket() const { return *a_.ticket; }
  // Whether a read that may be dropped has still to bring the expert's bytes; it is a demand now.
  bool demand(int32_t layer, int32_t expert) const;

  // Slots of the layer's class that the RAM tier can do without.
  int64_t spare(const residency::Planner& planner, int32_t layer) const {
    return s_.free_count[s_.layer_class[layer]] - planner.state().ram.free(layer);
  }
  // How many experts of the layer's class may be brought ahead: steps keep half of the staging
  // slots, and one expert takes up to two of them.
  int64_t ahead_room(const residency::Planner& planner, int32_t layer) const {
    const int32_t c = s_.layer_class[layer], steps = std::max(2, a_.staging[c] / 2);
    const int64_t left = a_.staging[c] - steps - a_.ahead[c];
    return std::max<int64_t>(0, std::min(left, spare(planner, layer))) / 2;
  }

 private:
  int64_t key(int32_t layer, int32_t expert) const { return layer * s_.slot_of.width + expert; }
  Copy* make_room(residency::Planner& planner, int32_t layer, const residency::Fetch& f, bool ahead,
                  Copy* copies) const;
  bool demote(residency::Planner& planner, int32_t layer, int32_t expert, int32_t vram, bool ahead,
              Copy* out) const;
  void settle(const residency::Planner& planner, int32_t layer, int32_t expert) const;
  int32_t take_quiet(int32_t size_class) const;
  Copy order(CopyKind kind, int32_t layer, int32_t expert, int32_t vram, bool ahead) const;

  const Segment s_;
  const VramArrays a_;
};

}  // namespace fomoe::engine
