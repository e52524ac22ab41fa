#include "planner.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

namespace fomoe::residency {

Planner::Planner(const State& state, PlanArrays out, std::unique_ptr<Worth> worth,
                 bool is_exclusive)
    : state_(state),
      out_(out),
      worth_(std::move(worth)),
      is_exclusive_(is_exclusive),
      device_victims_(state_, state_.device, state_.history, followed_),
      ram_victims_(state_, state_.ram, is_exclusive ? state_.history : state_.ram_history,
                   followed_),
      guesses_(new bool[state.n_experts]()) {
  claims_.reserve(state.n_experts);
  experts_.reserve(state.n_experts);
}

int64_t Planner::plan(int32_t layer, const int32_t* wanted, int64_t n, const int32_t* in_ram_ids,
                      int64_t n_in_ram) {
  for (int64_t i = 0; i < n; ++i)
    if (wanted[i] < 0 || wanted[i] >= state_.n_experts || (i && wanted[i] <= wanted[i - 1]))
      throw Bug("the experts of a plan must ascend");
  const int32_t* const slots = state_.device.slot_of.row(layer);
  const int32_t* const in_ram = state_.ram.slot_of.row(layer);
  begin(layer, wanted, n);
  use_in_ram(layer, in_ram_ids, n_in_ram);
  int64_t hits = 0, found[3] = {};
  claims_.clear();
  for (const bool from_nvme : {false, true})
    for (int64_t i = 0; i < n; ++i) {
      const int32_t e = wanted[i];
      if (slots[e] < 0) {
        if ((in_ram[e] < 0) != from_nvme) continue;
        ++found[from_nvme ? kNvme : kRam];
        claims_.push_back({e, -1, from_nvme, int32_t(claims_.size()), {}});
      } else if (!from_nvme) {
        out_.hits[hits] = e;
        out_.hit_slots[hits++] = slots[e];
      }
    }
  int64_t* const lookups = state_.counters.lookups.row(layer);
  lookups[kDevice] += hits;
  lookups[kRam] += found[kRam];
  lookups[kNvme] += found[kNvme];
  if (claims_.empty()) return 0;
  claim_all(layer);
  for (int64_t i = 0; i < n_in_ram; ++i) guesses_[in_ram_ids[i]] = true;
  const int64_t fetches = move(layer, {false, layer, guesses_.get()});
  for (int64_t i = 0; i < n_in_ram; ++i) guesses_[in_ram_ids[i]] = false;
  return fetches;
}

void Planner::begin(int32_t layer, const int32_t* wanted, int64_t n) {
  const Flags& f = state_.flags;
  const int64_t step = ++state_.history.steps[layer];
  bool *const pinned = f.pinned.row(layer), *const unused = f.unused.row(layer),
              *const last = f.last_wanted.row(layer);
  std::memset(f.awaited.row(layer), 0, state_.n_experts);
  f.n_awaited[layer] = 0;
  std::memset(last, 0, state_.n_experts);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t e = wanted[i];
    state_.history.touch(layer, e, step);
    f.n_pinned[layer] += !pinned[e];
    state_.counters.prefetch_used[layer] += unused[e];
    pinned[e] = last[e] = true;
    unused[e] = false;
  }
}

// A use like any other, but of RAM: these experts have no slot of the device to pin.
void Planner::use_in_ram(int32_t layer, const int32_t* experts, int64_t n) {
  const int64_t step = state_.history.steps[layer];
  for (int64_t i = 0; i < n; ++i) {
    const int32_t e = experts[i];
    if (e < 0 || e >= state_.n_experts || tier(layer, e) != kRam)
      throw Bug("an expert that is to be computed in RAM does not lie there");
    state_.history.touch(layer, e, step);
    state_.flags.last_wanted.row(layer)[e] = true;
    if (!is_exclusive_) state_.ram_history.touch(layer, e, step);
  }
  if (n && !is_exclusive_) state_.ram_history.steps[layer] = step;
  state_.counters.lookups.row(layer)[kRam] += n;
}

// The worthiest victims meet the first experts: those from RAM stand first and swap with their
// victims, who are thus kept for sure; the rest go down by falling worth, so that none moves to RAM
// to be dropped by the next.
void Planner::claim_all(int32_t layer) {
  device_victims_.begin({});
  experts_.clear();
  for (Claim& claim : claims_) {
    claim.victim = least(layer);
    claim.slot = claim_slot(layer, claim.victim);
    experts_.push_back(claim.expert);
  }
  std::sort(claims_.begin(), claims_.end(), falls);
  for (size_t i = 0; i < claims_.size(); ++i) claims_[i].expert = experts_[i];
}

bool Planner::falls(const Claim& a, const Claim& b) {
  const Victim &v = a.victim, &w = b.victim;
  if ((v.expert < 0) != (w.expert < 0)) return w.expert < 0;
  if (v.expert >= 0 && v.worth != w.worth) return v.worth > w.worth;
  return v.expert != w.expert ? v.expert > w.expert : a.number < b.number;
}

// What would leave for the layer's next claim; none where a slot is free.
Victim Planner::least(int32_t layer) {
  if (state_.device.free(layer)) return {0.0, -1, -1};
  return device_victims_.peek(layer, *worth_);
}

int32_t Planner::claim_slot(int32_t layer, const Victim& victim) {
  if (victim.expert < 0) {
    if (!state_.device.free(layer)) throw Bug("no slot can be freed: the plan is above capacity()");
    return state_.device.take(layer);
  }
  device_victims_.pop(victim.layer);
  ++state_.counters.evictions[victim.layer];
  leave(victim.layer, victim.expert);
  return state_.device.take_from(victim.layer, victim.expert, layer);
}

int64_t Planner::prefetch(int32_t layer, const int32_t* candidates, int64_t n, int64_t limit,
                          bool eager) {
  const Table& table = state_.device;
  const Flags& f = state_.flags;
  int64_t allowed = table.size[layer] / 2;
  for (int32_t i = table.member_start[table.pool[layer]];
       i < table.member_start[table.pool[layer] + 1]; ++i)
    allowed -= f.n_awaited[table.members[i]];
  allowed = std::min(allowed, limit);
  for (int64_t i = 0; i < n; ++i)
    if (candidates[i] < 0 || candidates[i] >= state_.n_experts)
      throw Bug("a prefetch names an expert that the model does not have");
  for (int64_t i = 0; i < n; ++i) guesses_[candidates[i]] = true;
  device_victims_.begin({true, layer, guesses_.get()});
  claims_.clear();
  for (int64_t i = 0; i < n && int64_t(claims_.size()) < allowed; ++i) {
    const int32_t e = candidates[i];
    if (table.slot(layer, e) >= 0) continue;
    const Victim victim = least(layer);
    if (!table.free(layer)) {
      if (victim.expert < 0) continue;
      double worth = 0.0;
      if (!eager) worth_->values(state_.history, layer, &e, 1, &worth);
      if (!eager && victim.worth > worth) continue;
    }
    claims_.push_back({e, claim_slot(layer, victim), state_.ram.slot(layer, e) < 0,
                       int32_t(claims_.size()), victim});
    f.n_awaited[layer] += !f.awaited.row(layer)[e];
    f.awaited.row(layer)[e] = f.unused.row(layer)[e] = true;
  }
  for (int64_t i = 0; i < n; ++i) guesses_[candidates[i]] = false;
  std::sort(claims_.begin(), claims_.end(), [](const Claim& a, const Claim& b) {
    return a.from_nvme != b.from_nvme ? b.from_nvme : falls(a, b);
  });
  const int64_t fetches = move(layer);
  for (int64_t i = 0; i < fetches; ++i)
    ++state_.counters.prefetches.row(layer)[out_.fetches[i].source];
  return fetches;
}

// Applies the claims to both tables.
int64_t Planner::move(int32_t layer, Shelter in_ram) {
  // An inclusive tier keeps what a copy may still be reading; an exclusive one has none.
  ram_victims_.begin(in_ram);
  Fetch* fetch = out_.fetches;
  for (const Claim& claim : claims_) {
    const Victim& v = claim.victim;
    const int32_t ram_slot = state_.ram.slot(layer, claim.expert);
    state_.device.assign(layer, claim.expert, claim.slot);
    *fetch = {claim.expert,
              claim.slot,
              ram_slot >= 0 ? kRam : kNvme,
              ram_slot,
              v.expert < 0 ? -1 : v.layer,
              v.expert,
              -1,
              -1};
    if (ram_slot >= 0)
      promote(layer, fetch);
    else
      read(layer, v.worth, fetch);
    if (fetch->demoted_to >= 0) ++state_.counters.demotions[v.layer];
    ++fetch;
  }
  return fetch - out_.fetches;
}

// Exclusive: the two exchange places; without a victim the RAM slot becomes free. Inclusive: a use
// of the copy, and the victim is dropped.
void Planner::promote(int32_t layer, Fetch* fetch) {
  if (!is_exclusive_) {
    const int64_t step = state_.history.steps[layer];
    state_.ram_history.touch(layer, fetch->expert, step);
    state_.ram_history.steps[layer] = step;
  } else if (fetch->victim < 0) {
    state_.ram.give_up(layer, fetch->expert);
  } else {
    fetch->demoted_to = state_.ram.take_from(layer, fetch->expert, fetch->victim_layer);
    state_.ram.assign(fetch->victim_layer, fetch->victim, fetch->demoted_to);
  }
}

// Exclusive: the victim goes to RAM unless it is worth no more than what would leave for it.
// Inclusive: a copy of what is read stays if any slot can be had.
void Planner::read(int32_t layer, double worth, Fetch* fetch) {
  if (is_exclusive_) {
    if (fetch->victim < 0) return;
    fetch->demoted_to = room(fetch->victim_layer, worth);
    if (fetch->demoted_to >= 0)
      state_.ram.assign(fetch->victim_layer, fetch->victim, fetch->demoted_to);
    return;
  }
  fetch->kept_in = room(layer, std::numeric_limits<double>::infinity());
  if (fetch->kept_in < 0) return;
  const int64_t step = state_.history.steps[layer];
  state_.ram.assign(layer, fetch->expert, fetch->kept_in);
  state_.ram_history.touch(layer, fetch->expert, step);
  state_.ram_history.steps[layer] = step;
}

// Charges a RAM slot to the layer for an entry of this worth; -1 if it is not worth one.
int32_t Planner::room(int32_t layer, double worth) {
  if (state_.ram.free(layer)) return state_.ram.take(layer);
  const Victim v = ram_victims_.peek(layer, *worth_);
  // A layer below its quota has a right to a slot; inside a layer, worth decides.
  if (v.expert < 0 || (v.layer == layer && v.worth >= worth)) return -1;
  ram_victims_.pop(v.layer);
  ++state_.counters.ram_drops[v.layer];
  return state_.ram.take_from(v.layer, v.expert, layer);
}

void Planner::clear(const View<bool>& flags, int32_t* count, int32_t layer, int32_t expert) {
  bool& flag = flags.row(layer)[expert];
  count[layer] -= flag;
  flag = false;
}

// Drops the flags of an entry that left the device.
void Planner::leave(int32_t layer, int32_t expert) {
  clear(state_.flags.awaited, state_.flags.n_awaited, layer, expert);
  bool& unused = state_.flags.unused.row(layer)[expert];
  state_.counters.prefetch_wasted[layer] += unused;
  unused = false;
}

void Planner::release(int32_t layer) {
  const Flags& f = state_.flags;
  std::memset(f.pinned.row(layer), 0, state_.n_experts);
  std::memset(f.awaited.row(layer), 0, state_.n_experts);
  f.n_pinned[layer] = f.n_awaited[layer] = 0;
}

void Planner::release(int32_t layer, const int32_t* experts, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    clear(state_.flags.pinned, state_.flags.n_pinned, layer, experts[i]);
    clear(state_.flags.awaited, state_.flags.n_awaited, layer, experts[i]);
  }
}

void Planner::forget(int32_t layer, const int32_t* experts, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    for (const Table* table : {&state_.device, &state_.ram})
      if (table->slot(layer, experts[i]) >= 0) table->give_up(layer, experts[i]);
    leave(layer, experts[i]);
    clear(state_.flags.pinned, state_.flags.n_pinned, layer, experts[i]);
  }
}

bool Planner::recall(int32_t layer, int32_t expert) {
  if (state_.ram.slot(layer, expert) < 0 || state_.device.slot(layer, expert) < 0) return false;
  state_.device.give_up(layer, expert);
  leave(layer, expert);
  clear(state_.flags.pinned, state_.flags.n_pinned, layer, expert);
  return true;
}

void Planner::drop_demoted(int32_t layer, int32_t expert) {
  state_.ram.give_up(layer, expert);
  --state_.counters.demotions[layer];
}

int64_t Planner::capacity(int32_t layer) const {
  const Table& table = state_.device;
  int64_t left = table.size[layer] + state_.flags.n_awaited[layer];
  for (int32_t i = table.member_start[table.pool[layer]];
       i < table.member_start[table.pool[layer] + 1]; ++i) {
    const int32_t member = table.members[i];
    left -= state_.flags.n_pinned[member] + state_.flags.n_awaited[member];
  }
  return left;
}

}  // namespace fomoe::residency
