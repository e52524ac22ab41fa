// What a wave planner does on nodes of GPUs alone: copies, and experts that are computed in RAM.
#include <algorithm>

#include "waves.h"

namespace fomoe::engine {

using residency::kNvme;
using residency::kRam;

// Of a token's experts in RAM, the last ones by id stay there and are computed by the processor: how
// many is a function of how many there are.
void WavePlanner::choose_arm(int64_t tokens) {
  int64_t left = 0;
  for (int64_t i = 0; i < n_experts_; ++i) {
    stays_[grouped_[i]] = false;
    left += planner_.tier(layer_, grouped_[i]) == kRam;
  }
  if (tokens != 1 || !vram(layer_)) return;
  left = a_.arm[left];
  for (int64_t i = n_experts_ - 1; i >= 0 && left > 0; --i)
    if (planner_.tier(layer_, grouped_[i]) == kRam) {
      stays_[grouped_[i]] = true;
      --left;
    }
}

// How many of the step's next `n` experts its next wave has. A step in parts computes nothing in
// RAM: what lies there may have to leave before the last part is computed.
int64_t WavePlanner::fitting(int64_t n) {
  const VramSlots* const slots = vram(layer_);
  if (!slots) return n;
  const int64_t most = n < n_experts_ ? 0 : fitting(*slots, n);
  if (most == n_experts_) return most;
  for (int64_t i = 0; i < n_experts_; ++i) stays_[a_.experts[i]] = false;
  return fitting(*slots, n);
}

// How many of the step's next `n` experts can be brought with the slots that the segment has to
// spare: one for a read, and one for a victim whose slot in RAM is still being copied.
int64_t WavePlanner::fitting(const VramSlots& vram, int64_t n) const {
  int64_t spare = vram.spare(planner_, layer_);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t e = a_.experts[first_ + i], tier = planner_.tier(layer_, e);
    if (tier == kNvme) spare -= 2;
    if (tier == kRam && !stays_[e]) spare -= 1;
    if (spare >= 0) continue;
    if (i == 0) throw Bug("no slot of the segment can be freed for a step");
    return i;
  }
  return n;
}

// Moves the plan into segment and VRAM; charges the link for what crosses it. Returns the end of
// its reads.
Read* WavePlanner::move(const VramSlots& vram, int32_t layer, int64_t fetches, bool ahead,
                        Read* reads) {
  Copy* const first = a_.copies + step_copies_ + ahead_copies_;
  const VramSlots::Out end = vram.follow(planner_, layer, fetches, ahead, {reads, first});
  for (const Copy* copy = first; copy < end.copies; ++copy)
    (copy->kind == kLoad ? a_.counts->ram_bytes : a_.counts->demoted_bytes) += copy->nbytes;
  (ahead ? ahead_copies_ : step_copies_) += end.copies - first;
  if (!ahead) open(layer).assign(first, end.copies);
  a_.counts->nvme_bytes += (end.reads - reads) * a_.expert_bytes[layer];
  return end.reads;
}

// Asks for what was ordered ahead and is wanted now: its read again, in case storage dropped it, and
// its copy, unless that has ended. Keeps what is computed in RAM. Returns the end of the reads.
Read* WavePlanner::demand(const VramSlots& vram, const int32_t* experts, int64_t n,
                          uint64_t ticket, Read* reads) {
  std::vector<Copy>& orders = open(layer_);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t e = experts[i];
    a_.unproven.row(layer_)[e] = residency::kDevice;
    if (vram.demand(layer_, e)) {
      Entry at;
      segments_[a_.layer_node[layer_]].locate(layer_, e, &at);
      *reads++ = {at.address, at.generation, at.slot, layer_, e, 0, 0, 0};
    }
    if (planner_.state().device.slot(layer_, e) < 0) {
      orders.push_back(vram.compute(layer_, e));
    } else if (!vram.is_in_vram(planner_, layer_, e) &&
               !vram.is_ordered(planner_, layer_, e, ticket)) {
      orders.push_back(vram.load(planner_, layer_, e, false));
      a_.copies[step_copies_++] = orders.back();
    }
  }
  return reads;
}

Entry WavePlanner::locate(int32_t expert) const {
  if (const VramSlots* const slots = vram(layer_))
    return state().device.slot(layer_, expert) < 0 ? slots->locate_in_ram(layer_, expert)
                                                   : slots->locate(planner_, layer_, expert);
  Entry entry;
  segments_[a_.layer_node[layer_]].locate(layer_, expert, &entry);
  return entry;
}

// How much may be brought ahead depends on what has been answered. Where the processor computes what
// lies in RAM, that would choose who computes, so nothing is brought ahead.
int64_t WavePlanner::ahead_room(int32_t layer, int64_t n) const {
  const VramSlots* const slots = vram(layer);
  if (!slots) return n;
  const bool has_arm = std::any_of(a_.arm, a_.arm + shape_.top_k + 1, [](int32_t m) { return m > 0; });
  return has_arm ? 0 : std::min(n, slots->ahead_room(planner_, layer));
}

bool WavePlanner::is_tight(int32_t layer) const {
  const VramSlots* const slots = vram(layer);
  if (!slots || slots->spare(planner_, layer) >= 2 * shape_.top_k) return false;
  return std::any_of(open_.begin(), open_.end(), [](const auto& copies) { return !copies.empty(); });
}

void WavePlanner::give_up_guesses() {
  clear();
  const VramSlots* const slots = vram(layer_);
  if (!slots) return;
  for (const int32_t e : ahead_.in_vain())
    if (state().device.slot(layer_, e) >= 0 && !slots->is_in_vram(planner_, layer_, e) &&
        slots->stays_in_ram(planner_, layer_, e) && !a_.background.row(layer_)[e])
      a_.copies[ahead_copies_++] = slots->cancel(layer_, e);
}

void WavePlanner::answered(int32_t device, bool aborted) {
  for (const Copy& copy : open_[device])
    if (vram(copy.layer)->end(planner_, copy, false, copy.kind == kDemote || !aborted))
      a_.unproven.row(copy.layer)[copy.expert] = residency::kDevice;
  open_[device].clear();
}

void WavePlanner::ended(const Copy& copy) {
  const VramSlots* const slots = vram(copy.layer);
  if (!slots) throw Bug("a copy has ended on a node that has no GPU");
  if (slots->end(planner_, copy, true, copy.outcome == kDone))
    a_.unproven.row(copy.layer)[copy.expert] = residency::kDevice;
}

}  // namespace fomoe::engine
