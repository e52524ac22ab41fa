// What a plan may evict, least worthy first.
#pragma once

#include <cstdint>
#include <vector>

#include "tables.h"

namespace fomoe::residency {

// An eviction policy: what experts of a layer are worth; see policy.py.
class Worth {
 public:
  virtual ~Worth() = default;
  virtual void values(const History& history, int32_t layer, const int32_t* experts, int64_t n,
                      double* out) = 0;
};

class LruWorth : public Worth {
 public:
  void values(const History& history, int32_t layer, const int32_t* experts, int64_t n,
              double* out) override;
};

class LfruWorth : public Worth {
 public:
  void values(const History& history, int32_t layer, const int32_t* experts, int64_t n,
              double* out) override;
};

struct Victim {
  double worth;
  int32_t layer, expert;  // expert -1: none
};

// What protects entries during one plan, besides pins and waiting.
struct Shelter {
  bool last_wanted = false;  // of every layer
  int32_t layer = -1;        // the layer that `guesses` are of, -1 for none
  const bool* guesses = nullptr;
};

// What decisions take as resident; an expert of it leaves after all others, for a guess never.
struct Followed {
  const bool* resident = nullptr;  // [L, E], null for none
};

// The entries of a table that one plan may evict. A layer at its quota gives up its own; otherwise,
// or if it has none to give, the layer most over its quota does (the lower index at a tie). Rows
// are ranked when first needed and then stay as they were.
class VictimQueue {
 public:
  VictimQueue(const State& state, const Table& table, const History& history,
              const Followed& followed);

  void begin(Shelter shelter);
  Victim peek(int32_t layer, Worth& worth);
  void pop(int32_t layer);  // what peek() returned

 private:
  struct Entry {
    double worth;
    int32_t expert;
    bool operator<(const Entry& o) const {  // std's heaps have the greatest first
      return worth != o.worth ? worth > o.worth : expert > o.expert;
    }
  };

  // The row's heap, ranked on the first call of a plan; returns how many entries are left.
  int64_t ready(int32_t layer, Worth& worth);
  int64_t collect(int32_t layer);
  // Of the layer's experts, what decisions take as resident.
  const uint8_t* followed(int32_t layer) const;
  Entry* row(int32_t layer) { return entries_.data() + int64_t(layer) * state_.n_experts; }

  const State& state_;
  const Table& table_;
  const History& history_;
  const Followed& followed_;
  Shelter shelter_;
  std::vector<Entry> entries_;    // [L, E]
  std::vector<int64_t> left_;     // [L], -1 for rows not ranked yet
  std::vector<int32_t> experts_;  // [E], scratch
  std::vector<double> values_;    // [E], scratch
  std::vector<uint8_t> nothing_;  // [E], zeros
  std::vector<uint8_t> tried_;    // [L], scratch
};

}  // namespace fomoe::residency
