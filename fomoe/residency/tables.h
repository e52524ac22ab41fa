// The residency's state as the native rules see it: memory of the NumPy arrays in state.py.
#pragma once

#include <cstdint>

#include "fomoe/native/view.h"

namespace fomoe::residency {

enum Tier : int32_t { kDevice = 0, kRam = 1, kNvme = 2 };

// One tier's slots; see SlotTable.
struct Table {
  View<int32_t> slot_of;  // [L, E]
  int32_t* held;          // [L]
  const int32_t* quota;   // [L]
  const int32_t* size;    // [L]
  const int32_t* pool;    // [L]
  const int32_t *members, *member_start;
  int32_t *free_slots, *free_count;
  const int32_t* free_start;

  int32_t slot(int32_t layer, int32_t expert) const { return slot_of.row(layer)[expert]; }
  void assign(int32_t layer, int32_t expert, int32_t slot) const {
    slot_of.row(layer)[expert] = slot;
  }
  int32_t free(int32_t layer) const { return free_count[pool[layer]]; }

  // Charges a free slot to the layer; assign() must follow.
  int32_t take(int32_t layer) const {
    const int32_t p = pool[layer];
    ++held[layer];
    return free_slots[free_start[p] + --free_count[p]];
  }

  // Evicts an entry and charges its slot to `heir`; assign() must follow.
  int32_t take_from(int32_t layer, int32_t expert, int32_t heir) const {
    const int32_t found = slot(layer, expert);
    assign(layer, expert, -1);
    --held[layer];
    ++held[heir];
    return found;
  }

  void give_up(int32_t layer, int32_t expert) const {
    const int32_t p = pool[layer];
    free_slots[free_start[p] + free_count[p]++] = slot(layer, expert);
    assign(layer, expert, -1);
    --held[layer];
  }
};

// Past use of a tier's experts; `owner` is the Python object, for policies written in Python.
struct History {
  View<int64_t> uses, last;  // [L, E]
  int64_t* steps;            // [L]
  void* owner;

  void touch(int32_t layer, int32_t expert, int64_t step) const {
    ++uses.row(layer)[expert];
    last.row(layer)[expert] = step;
  }
};

struct Flags {
  View<bool> pinned, awaited, unused, last_wanted;  // [L, E]
  int32_t *n_pinned, *n_awaited;                    // [L]
};

struct Counters {
  View<int64_t> lookups, prefetches;                                             // [L, 3]
  int64_t *prefetch_used, *prefetch_wasted, *evictions, *demotions, *ram_drops;  // [L]
};

struct State {
  int32_t n_layers, n_experts;
  Table device, ram;
  History history, ram_history;
  Flags flags;
  Counters counters;

  // Between two steps of a layer lie a token's weights: its rows are in no cache any more.
  void ask_for(int32_t layer) const {
    for (const Table* table : {&device, &ram}) table->slot_of.ask_for(layer);
    for (const History* past : {&history, &ram_history}) {
      past->uses.ask_for(layer);
      past->last.ask_for(layer);
    }
    for (const View<bool>* flag :
         {&flags.pinned, &flags.awaited, &flags.unused, &flags.last_wanted})
      flag->ask_for(layer);
  }
};

}  // namespace fomoe::residency
