// Logical caches of many sequences, and the decision hash; logical.py says what they promise.
#pragma once

#include <cstdint>
#include <vector>

namespace fomoe::residency {

// One to one and alike on every platform.
// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
inline uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// The hash's word of one (token, layer, expert).
inline uint64_t decision_word(int64_t token, int64_t layer, int64_t expert) {
  return splitmix64(uint64_t(token) << 32 | uint64_t(layer) << 16 | uint64_t(expert));
}

struct TokenLog {
  int64_t* tokens;  // [L], tokens so far
  uint64_t* hash;
};

// Feeds the hash with the next tokens' experts, ids [tokens, k]; returns the first one's number.
inline int64_t observe(int32_t layer, const int32_t* ids, int64_t tokens, int64_t k, TokenLog log) {
  const int64_t first = log.tokens[layer];
  // A sum does not depend on order, so neither layer-major prefill nor chunks change it.
  uint64_t sum = 0;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < k; ++i) sum += decision_word(first + t, layer, ids[t * k + i]);
  *log.hash += sum;
  log.tokens[layer] += tokens;
  return first;
}

enum class Eviction : int32_t { kLru, kLfru, kMass };

struct LogicalShape {
  int64_t sequences, layers, experts, capacity, flights;
};

struct LogicalRules {
  Eviction eviction;
  int64_t shift;                  // of the moving average of probabilities
  int64_t fill_count, fill_per;   // background reads per so many steps of a layer
  int64_t delay, warmup;          // in tokens
};

// Columns of `counts`.
enum LogicalCount : int32_t { kMissed, kDemand, kJoined, kBackground, kSubstituted, kDropped };
constexpr int64_t kLogicalCounts = 6;

// Arrays of the Python object; S sequences, L layers, E experts, C capacity, F flights.
struct LogicalArrays {
  bool* resident;      // [S, L, E]
  int32_t* members;    // [S, L, C], the resident ones in no order
  int32_t* held;       // [S, L], how many
  uint32_t* weight;    // [S, L, E], lfru: decayed count at `last`; mass: moving average
  int32_t* last;       // [S, L, E], token of the last use (lru) or wish (lfru), -1 for none
  int64_t* tokens;     // [S, L]
  int64_t* decoded;    // [S, L], tokens that came by decisions
  uint64_t* hash;      // [S]
  int64_t* credit;     // [S, L], background reads due, in parts of fill_per
  int32_t* flight;     // [S, L, F], experts under way, oldest first
  int64_t* due;        // [S, L, F], the token that may use each
  int32_t* flying;     // [S, L], how many
  int64_t* counts;     // [S, L, 6]
  const uint64_t* decay;     // [ages], decay^age
  const uint64_t* quotient;  // [ages], decay^age / (age + 1)
  int64_t ages;
};

class LogicalCaches {
 public:
  // What a thread needs; one per thread.
  struct Scratch {
    struct Entry {
      uint64_t worth;
      int32_t expert;
      bool operator<(const Entry& o) const {
        return worth != o.worth ? worth < o.worth : expert < o.expert;
      }
    };
    explicit Scratch(int64_t experts) : kept(experts), coming(experts) {}
    std::vector<uint8_t> kept;  // [E], all 0 between calls
    std::vector<Entry> order;
    std::vector<int32_t> coming;
  };

  LogicalCaches(LogicalShape shape, LogicalRules rules, LogicalArrays arrays)
      : shape_(shape), rules_(rules), a_(arrays) {}

  const LogicalShape& shape() const { return shape_; }
  const LogicalRules& rules() const { return rules_; }

  // A layer of a sequence.
  int64_t cell(int64_t sequence, int64_t layer) const { return sequence * shape_.layers + layer; }
  const bool* resident(int64_t cell) const { return a_.resident + cell * shape_.experts; }
  // Brings a layer of a sequence near; see State::ask_for.
  void ask_for(int64_t cell) const;
  bool is_warming(int64_t cell) const { return a_.decoded[cell] < rules_.warmup; }
  int64_t* counts(int64_t cell) const { return a_.counts + cell * kLogicalCounts; }

  // A token of a layer is one event: weigh() where eviction goes by mass, then want(), run(),
  // fill() if it was decided, close().
  void weigh(int64_t cell, const float* probabilities) const;  // [E]
  void weigh(int64_t cell, const int32_t* ids, const float* probabilities, int64_t count) const;
  void want(int64_t cell, const int32_t* ids, int64_t k) const;
  // Brings in what runs, ids [k] (-1: nothing); none of them leaves. read[i]: a demand read.
  void run(int64_t cell, const int32_t* ids, int64_t k, bool* read, Scratch& scratch) const;
  // Asks for wanted experts that did not run, as far as there is credit; writes up to k ids, -1
  // behind the last.
  void fill(int64_t cell, const int32_t* wanted, const int32_t* ids, int64_t k,
            int32_t* issued) const;
  // Hashes what ran, under `price` if it is not null; then the next token's reads land.
  void close(int64_t cell, const int32_t* ids, int64_t k, const float* price,
             Scratch& scratch) const;
  void count_decoded(int64_t cell) const { ++a_.decoded[cell]; }

 private:
  uint64_t worth(int64_t cell, int32_t expert, int64_t now) const;
  void admit(int64_t cell, int64_t now, Scratch& scratch, int64_t coming) const;
  bool take_off(int64_t cell, int32_t expert) const;
  bool is_flying(int64_t cell, int32_t expert) const;
  void land(int64_t cell, int64_t now, Scratch& scratch) const;
  uint32_t* weight(int64_t cell) const { return a_.weight + cell * shape_.experts; }
  int32_t* last(int64_t cell) const { return a_.last + cell * shape_.experts; }

  const LogicalShape shape_;
  const LogicalRules rules_;
  const LogicalArrays a_;
};

}  // namespace fomoe::residency
