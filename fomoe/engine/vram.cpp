#include "vram.h"

#include <utility>

namespace fomoe::engine {

using residency::Fetch;
using residency::Planner;

VramSlots::Out VramSlots::follow(Planner& planner, int32_t layer, int64_t fetches, bool ahead,
                                 Out out) const {
  const Fetch* const plan = planner.fetches();
  for (int64_t i = 0; i < fetches; ++i) a_.holds[a_.pool_first[layer] + plan[i].slot] = -1;
  for (int64_t i = 0; i < fetches; ++i)
    out.copies = make_room(planner, layer, plan[i], ahead, out.copies);
  for (int64_t i = 0; i < fetches; ++i) {
    if (plan[i].source == residency::kNvme) {
      *out.reads = s_.assign(layer, plan[i].expert);
      a_.reading[out.reads++->slot] = ahead ? kIdle : kDemanded;
    }
    *out.copies++ = load(planner, layer, plan[i].expert, ahead);
  }
  return out;
}

// What leaves for a fetch: RAM's own victim first, whose slot the device's victim can have.
Copy* VramSlots::make_room(Planner& planner, int32_t layer, const Fetch& f, bool ahead,
                           Copy* copies) const {
  const int64_t from_demoted =
      f.demoted_to < 0 ? -1 : s_.exchange(layer, f.demoted_to, f.victim_layer, f.victim);
  const int64_t from_kept = f.kept_in < 0 ? -1 : s_.exchange(layer, f.kept_in, layer, f.expert);
  for (const int64_t gone : {from_demoted, from_kept})
    if (gone >= 0)
      settle(planner, int32_t(gone / s_.slot_of.width), int32_t(gone % s_.slot_of.width));
  if (f.victim < 0) return copies;
  copies += demote(planner, f.victim_layer, f.victim, f.slot, ahead, copies);
  settle(planner, f.victim_layer, f.victim);
  return copies;
}

// A victim whose bytes lie in the segment, or are on their way there, goes down without a copy.
bool VramSlots::demote(Planner& planner, int32_t layer, int32_t expert, int32_t vram, bool ahead,
                       Copy* out) const {
  int32_t& slot = s_.slot_of.row(layer)[expert];
  if (slot >= 0 || planner.state().ram.slot(layer, expert) < 0) return false;
  const int32_t taken = take_quiet(s_.layer_class[layer]);
  if (taken < 0) {
    planner.drop_demoted(layer, expert);
    return false;
  }
  slot = taken;
  ++s_.generation[slot];
  *out = order(kDemote, layer, expert, vram, ahead);
  return true;
}

Copy VramSlots::load(const Planner& planner, int32_t layer, int32_t expert, bool ahead) const {
  const int32_t vram = planner.state().device.slot(layer, expert);
  const Copy copy = order(kLoad, layer, expert, vram, ahead);
  a_.tickets[a_.pool_first[layer] + vram] = copy.ticket;
  a_.holds[a_.pool_first[layer] + vram] = -1;
  return copy;
}

Copy VramSlots::cancel(int32_t layer, int32_t expert) const {
  const int32_t slot = s_.slot_of.row(layer)[expert];
  return {s_.address[slot], s_.generation[slot], *a_.ticket, a_.expert_bytes[layer],
          kCancel,          layer,               expert,     -1,
          slot,             kOpen};
}

Copy VramSlots::compute(int32_t layer, int32_t expert) const {
  return order(kCompute, layer, expert, -1, false);
}

Copy VramSlots::order(CopyKind kind, int32_t layer, int32_t expert, int32_t vram,
                      bool ahead) const {
  const int32_t slot = s_.slot_of.row(layer)[expert];
  if (slot < 0) throw Bug("an expert that is to be copied has no slot of the segment");
  ++a_.users[slot];
  if (ahead) ++a_.ahead[s_.layer_class[layer]];
  return {s_.address[slot], s_.generation[slot], ++*a_.ticket, a_.expert_bytes[layer],
          kind,             layer,               expert,       vram,
          slot,             kOpen};
}

bool VramSlots::end(Planner& planner, const Copy& copy, bool ahead, bool done) const {
  --a_.users[copy.slot];
  if (ahead) --a_.ahead[s_.layer_class[copy.layer]];
  bool lost = false;
  if (copy.kind == kLoad) {
    const int32_t at = a_.pool_first[copy.layer] + copy.vram;
    const bool is_last = a_.tickets[at] == copy.ticket;
    if (is_last && done) a_.holds[at] = key(copy.layer, copy.expert);
    lost = is_last && !done && planner.state().device.slot(copy.layer, copy.expert) == copy.vram;
    if (lost && stays_in_ram(planner, copy.layer, copy.expert))
      lost = !planner.recall(copy.layer, copy.expert);
    if (lost) planner.forget(copy.layer, &copy.expert, 1);
  }
  // Its bytes were seen there.
  if (done && copy.kind != kDemote) a_.reading[copy.slot] = kEnded;
  if (s_.slot_of.row(copy.layer)[copy.expert] == copy.slot)
    settle(planner, copy.layer, copy.expert);
  else if (a_.users[copy.slot] == 0)
    s_.give_back(copy.layer, copy.slot);
  return lost;
}

// Takes the slot of the segment from an expert that needs none, for others as soon as no record
// names it.
void VramSlots::settle(const Planner& planner, int32_t layer, int32_t expert) const {
  int32_t& slot = s_.slot_of.row(layer)[expert];
  if (slot < 0 || planner.state().ram.slot(layer, expert) >= 0) return;
  if (planner.state().device.slot(layer, expert) >= 0 && !is_in_vram(planner, layer, expert))
    return;
  if (a_.users[slot] == 0) s_.give_back(layer, slot);
  slot = -1;
}

// A free slot that storage is not writing to; -1 for none. Reads take what lies on top of the stack,
// so those that it may be writing to never pile up.
int32_t VramSlots::take_quiet(int32_t size_class) const {
  int32_t* const stack = s_.free_slots + s_.class_first[size_class];
  int32_t& height = s_.free_count[size_class];
  for (int32_t at = height - 1; at >= 0; --at) {
    if (a_.reading[stack[at]] != kEnded) continue;
    std::swap(stack[at], stack[height - 1]);
    return stack[--height];
  }
  return -1;
}

Entry VramSlots::locate(const Planner& planner, int32_t layer, int32_t expert) const {
  const int32_t vram = planner.state().device.slot(layer, expert);
  if (is_in_vram(planner, layer, expert)) return {0, 0, vram, expert};
  const int32_t slot = s_.slot_of.row(layer)[expert];
  return {s_.address[slot], s_.generation[slot], vram, expert};
}

Entry VramSlots::locate_in_ram(int32_t layer, int32_t expert) const {
  const int32_t slot = s_.slot_of.row(layer)[expert];
  return {s_.address[slot], s_.generation[slot], ~slot, expert};
}

bool VramSlots::demand(int32_t layer, int32_t expert) const {
  const int32_t slot = s_.slot_of.row(layer)[expert];
  if (slot < 0 || a_.reading[slot] != kIdle) return false;
  a_.reading[slot] = kDemanded;
  return true;
}

}  // namespace fomoe::engine
