// The residency's rules: plans, prefetches, pins. fomoe/residency/residency.py has the contract of
// each call, fomoe/residency/reference the same rules in Python.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "tables.h"
#include "victims.h"

namespace fomoe::residency {

// As `Fetch` of plans.py; the victim is -1, -1 if there is none.
struct Fetch {
  int32_t expert, slot, source, ram_slot, victim_layer, victim, demoted_to, kept_in;
};

// Where the last plan stands; room for E entries each.
struct PlanArrays {
  int32_t *hits, *hit_slots;
  Fetch* fetches;
};

class Planner {
 public:
  Planner(const State& state, PlanArrays out, std::unique_ptr<Worth> worth, bool is_exclusive);
  Planner(const Planner&) = delete;

  // Both return the number of fetches; a plan's other experts are hits. `in_ram` are computed
  // where they lie: they move nowhere and nothing of the plan takes their place.
  int64_t plan(int32_t layer, const int32_t* wanted, int64_t n, const int32_t* in_ram = nullptr,
               int64_t n_in_ram = 0);
  int64_t prefetch(int32_t layer, const int32_t* candidates, int64_t n, int64_t limit, bool eager);

  void release(int32_t layer);
  void release(int32_t layer, const int32_t* experts, int64_t n);
  void forget(int32_t layer, const int32_t* experts, int64_t n);
  // Takes an entry from the device whose bytes never came there, where RAM has it as well; returns
  // whether it does.
  bool recall(int32_t layer, int32_t expert);
  int64_t capacity(int32_t layer) const;
  // A victim's bytes find no place in RAM: the plan drops it instead.
  void drop_demoted(int32_t layer, int32_t expert);
  // Keep what `resident` [L, E] marks, as it changes; null for nothing.
  void follow(const bool* resident) { followed_.resident = resident; }

  int32_t tier(int32_t layer, int32_t expert) const {
    if (state_.device.slot(layer, expert) >= 0) return kDevice;
    return state_.ram.slot(layer, expert) >= 0 ? kRam : kNvme;
  }
  const Fetch* fetches() const { return out_.fetches; }
  const State& state() const { return state_; }

 private:
  struct Claim {
    int32_t expert, slot;
    bool from_nvme;
    int32_t number;  // in the order of claiming
    Victim victim;
  };

  void begin(int32_t layer, const int32_t* wanted, int64_t n);
  void use_in_ram(int32_t layer, const int32_t* experts, int64_t n);
  void claim_all(int32_t layer);
  int32_t claim_slot(int32_t layer, const Victim& victim);
  Victim least(int32_t layer);
  static bool falls(const Claim& a, const Claim& b);
  int64_t move(int32_t layer, Shelter in_ram = {});
  void promote(int32_t layer, Fetch* fetch);
  void read(int32_t layer, double worth, Fetch* fetch);
  int32_t room(int32_t layer, double worth);
  void leave(int32_t layer, int32_t expert);
  void clear(const View<bool>& flags, int32_t* count, int32_t layer, int32_t expert);

  const State state_;
  const PlanArrays out_;
  const std::unique_ptr<Worth> worth_;
  const bool is_exclusive_;
  Followed followed_;
  VictimQueue device_victims_, ram_victims_;
  std::vector<Claim> claims_;        // [E], capacity kept
  std::vector<int32_t> experts_;     // [E], capacity kept
  std::unique_ptr<bool[]> guesses_;  // [E], all false between calls
};

}  // namespace fomoe::residency
