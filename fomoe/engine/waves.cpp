#include "waves.h"

#include <algorithm>
#include <utility>

namespace fomoe::engine {

using residency::Fetch;
using residency::kDevice;
using residency::kNvme;
using residency::kRam;

WavePlanner::WavePlanner(residency::Planner& planner, std::vector<Segment> segments,
                         std::vector<std::optional<VramSlots>> vram, WaveArrays arrays,
                         AheadArrays ahead, WaveShape shape)
    : planner_(planner),
      segments_(std::move(segments)),
      vram_(std::move(vram)),
      a_(arrays),
      shape_(shape),
      ahead_(planner.state().n_layers, ahead, shape.budget_permille),
      router_(planner.state().n_experts, shape.top_k) {
  const int64_t pairs = shape.max_tokens * shape.top_k, n = planner.state().n_experts;
  for (std::vector<int32_t>* by_pair : {&pair_token_, &order_, &ranks_, &moved_})
    by_pair->resize(pairs);
  grouped_.resize(pairs);
  pair_start_.resize(pairs + 1);
  sorted_.resize(n);
  margins_.resize(n);
  source_.resize(n);
  stays_.resize(n);
  in_ram_.reserve(n);
  const int32_t* const devices = a_.layer_device;
  open_.resize(1 + *std::max_element(devices, devices + state().n_layers));
}

int64_t WavePlanner::route(const float* scores, int64_t tokens) {
  const int64_t n = router_.n_experts(), k = router_.k();
  for (int64_t t = 0; t < tokens; ++t)
    if (!router_.route(scores + t * n, a_.ids + t * k, a_.weights + t * k)) return t;
  return -1;
}

void WavePlanner::begin(int32_t layer, int64_t tokens, const bool* substituted,
                        const StepArrays& out) {
  if (!open(layer).empty()) throw Bug("the device has not answered for its last wave");
  layer_ = layer;
  out_ = out;
  first_ = end_ = 0;
  room_ = std::max<int64_t>(state().device.quota[layer], shape_.top_k);
  group(tokens);
  choose_arm(tokens);
  arrange(tokens);
  ahead_.score(layer, a_.experts, n_experts_);
  if (!substituted) return;
  // A substitute's activation is counted as such, not by where its bytes lie.
  for (int64_t p = 0; p < tokens * shape_.top_k; ++p) {
    if (!substituted[p]) continue;
    const int32_t* const at = std::find(a_.experts, a_.experts + n_experts_, a_.ids[p]);
    --a_.pairs[at - a_.experts];
  }
}

// The pairs by ascending expert. One token needs no counting over all experts.
void WavePlanner::group(int64_t tokens) {
  const int64_t k = shape_.top_k;
  if (tokens != 1) {
    n_experts_ = grouper_.group(
        a_.ids, tokens, k, state().n_experts,
        {grouped_.data(), pair_start_.data(), pair_token_.data(), order_.data(), ranks_.data()});
    return;
  }
  n_experts_ = k;
  for (int32_t rank = 0; rank < k; ++rank) {
    int64_t at = rank;
    for (; at > 0 && grouped_[at - 1] > a_.ids[rank]; --at) {
      grouped_[at] = grouped_[at - 1];
      ranks_[at] = ranks_[at - 1];
    }
    grouped_[at] = a_.ids[rank];
    ranks_[at] = rank;
    order_[rank] = pair_start_[rank] = rank;
    pair_token_[rank] = 0;
  }
  pair_start_[k] = int32_t(k);
}

// Writes the step with pairs renumbered so that experts stand in the order they are served:
// the device's first, then those of RAM, then those that must be read, ascending in each.
void WavePlanner::arrange(int64_t tokens) {
  int64_t at = 0;
  int32_t pair = 0;
  out_.pair_start[0] = 0;
  for (const int32_t tier : {kDevice, kRam, kNvme})
    for (int64_t i = 0; i < n_experts_; ++i) {
      if (planner_.tier(layer_, grouped_[i]) != tier) continue;
      const int32_t from = pair_start_[i], count = pair_start_[i + 1] - from;
      for (int32_t j = 0; j < count; ++j) {
        moved_[from + j] = pair + j;
        out_.pair_token[pair + j] = pair_token_[from + j];
      }
      a_.experts[at] = grouped_[i];
      a_.pairs[at++] = count;
      out_.pair_start[at] = pair += count;
    }
  const int64_t k = shape_.top_k;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < k; ++i) {
      out_.order[t * k + i] = moved_[order_[t * k + i]];
      out_.weights[t * k + i] = a_.weights[t * k + ranks_[t * k + i]];
    }
}

int64_t WavePlanner::wave() {
  const int64_t room = std::min(room_, planner_.capacity(layer_));
  if (end_ == n_experts_) throw Bug("the step has no experts left");
  if (room < 1) throw Bug("no slot of the layer's pool can be freed for its step");
  if (!open(layer_).empty()) throw Bug("the device has not answered for its last wave");
  first_ = end_;
  end_ = first_ + fitting(std::min(room, n_experts_ - first_));
  const int64_t n = end_ - first_;
  const int32_t* const experts = a_.experts + first_;
  const int64_t fetches = plan(experts, n);
  clear();
  count(experts, n, fetches);
  const VramSlots* const slots = vram(layer_);
  const uint64_t ticket = slots ? slots->ticket() : 0;
  Read* end = fetch(layer_, fetches, false, a_.reads);
  end = slots ? demand(*slots, experts, n, ticket, end) : prove(experts, n, end);
  address(a_.reads, end, shape_.demand);
  for (int64_t i = 0; i < n; ++i) out_.entries[first_ + i] = locate(experts[i]);
  return end - a_.reads;
}

// Plans the experts of a wave; those that stay in RAM go to `in_ram_`.
int64_t WavePlanner::plan(const int32_t* experts, int64_t n) {
  int64_t moved = 0;
  in_ram_.clear();
  for (int64_t i = 0; i < n; ++i)
    if (stays_[experts[i]] && planner_.tier(layer_, experts[i]) == kRam)
      in_ram_.push_back(experts[i]);
    else
      sorted_[moved++] = experts[i];
  std::sort(sorted_.begin(), sorted_.begin() + moved);
  return planner_.plan(layer_, sorted_.data(), moved, in_ram_.data(), int64_t(in_ram_.size()));
}

// Counts the wave's activations, and substitutes, by the tier that their bytes came from.
void WavePlanner::count(const int32_t* experts, int64_t n, int64_t fetches) {
  int8_t* const unproven = a_.unproven.row(layer_);
  bool* const background = a_.background.row(layer_);
  const Fetch* const plan = planner_.fetches();
  for (int64_t i = 0; i < fetches; ++i)  // a prefetch of it, if any, was evicted unused
    if (plan[i].source == kNvme) {
      unproven[plan[i].expert] = kDevice;
      background[plan[i].expert] = false;
    }
  for (int64_t i = 0; i < n; ++i)
    // What was read in the background is a hit: it was paid for when it was asked for.
    source_[experts[i]] = background[experts[i]] ? int8_t(kDevice) : unproven[experts[i]];
  const int64_t nbytes = a_.expert_bytes[layer_];
  for (int64_t i = 0; i < n; ++i)
    if (source_[experts[i]] != kDevice)
      a_.counts->guesses_used += ahead_.earn(layer_, experts[i], nbytes, true);
  for (int64_t i = 0; i < fetches; ++i) {
    const int32_t e = plan[i].expert;
    if (plan[i].source == kNvme) ahead_.earn(layer_, e, nbytes, false);
    if (source_[e] != kNvme) source_[e] = int8_t(plan[i].source);
  }
  for (const int32_t e : in_ram_)
    if (source_[e] != kNvme) source_[e] = int8_t(kRam);
  a_.counts->computed_in_ram = int64_t(in_ram_.size());
  for (int64_t i = first_; i < first_ + n; ++i) {
    const int32_t tier = source_[a_.experts[i]];
    a_.counts->by_tier[tier] += a_.pairs[i];
    a_.counts->substitutes[tier] += out_.pair_start[i + 1] - out_.pair_start[i] - a_.pairs[i];
  }
}

// Moves the plan into the segment; charges link and RAM for what a card would move: promotions, and
// victims copied back. Returns the end of its reads.
Read* WavePlanner::fetch(int32_t layer, int64_t fetches, bool ahead, Read* reads) {
  if (const VramSlots* const slots = vram(layer)) return move(*slots, layer, fetches, ahead, reads);
  const Segment& segment = segments_[a_.layer_node[layer]];
  Read* const end = segment.apply(planner_, layer, fetches, reads);
  const Fetch* const plan = planner_.fetches();
  for (int64_t i = 0; i < fetches; ++i) {
    if (plan[i].source == kRam) a_.counts->ram_bytes += a_.expert_bytes[layer];
    if (plan[i].demoted_to >= 0) a_.counts->demoted_bytes += a_.expert_bytes[plan[i].victim_layer];
  }
  a_.counts->nvme_bytes += (end - reads) * a_.expert_bytes[layer];
  return end;
}

// Asks again, as demand, for prefetched experts that are wanted now: storage may have dropped a
// prefetch that never got its turn.
Read* WavePlanner::prove(const int32_t* experts, int64_t n, Read* reads) {
  int8_t* const unproven = a_.unproven.row(layer_);
  const Segment& segment = segments_[a_.layer_node[layer_]];
  for (int64_t i = 0; i < n; ++i) {
    if (unproven[experts[i]] == kDevice) continue;
    unproven[experts[i]] = kDevice;
    Entry e;
    segment.locate(layer_, experts[i], &e);
    *reads++ = {e.address, e.generation, e.slot, layer_, experts[i], 0, 0, 0};
  }
  return reads;
}

void WavePlanner::address(Read* first, Read* end, int32_t priority) {
  for (Read* r = first; r < end; ++r) {
    r->priority = priority;
    r->bell = a_.layer_device[r->layer];
  }
}

int64_t WavePlanner::read_later(int32_t layer, const int32_t* experts, int64_t n, int64_t reads) {
  const int64_t most = ahead_room(layer, n);
  const int64_t fetches = planner_.prefetch(layer, experts, n, most, true);
  Read* const first = a_.reads + reads;
  Read* const end = fetch(layer, fetches, true, first);
  const Fetch* const plan = planner_.fetches();
  const residency::History& history = state().history;
  for (int64_t i = 0; i < fetches; ++i) {
    const int32_t e = plan[i].expert;
    a_.unproven.row(layer)[e] = int8_t(plan[i].source);
    a_.background.row(layer)[e] = true;
    if (plan[i].source == kNvme) ahead_.earn(layer, e, a_.expert_bytes[layer], false);
    // It was wanted just now, which is all that speaks for keeping it until it is wanted again.
    history.touch(layer, e, history.steps[layer]);
  }
  a_.counts->background_reads = end - first;
  a_.counts->background_bytes = (end - first) * a_.expert_bytes[layer];
  address(first, end, shape_.background);
  return end - a_.reads;
}

int64_t WavePlanner::look_ahead(int32_t layer, int32_t depth, const float* scores,
                                int64_t tokens) {
  clear();
  const int64_t guesses = router_.predict(scores, tokens, sorted_.data(), margins_.data());
  // While a step is under way nothing may fail, least of all a guess.
  if (guesses < 0) return 0;
  const int64_t nbytes = a_.expert_bytes[layer];
  int64_t sure = 0, reads = 0;
  for (int64_t i = 0; i < guesses; ++i) {
    const int32_t e = sorted_[i], tier = planner_.tier(layer, e);
    const int32_t level = Ahead::level(margins_[i]);
    if (tier == kNvme && ahead_.note(layer, e, level, depth, nbytes, reads)) {
      sorted_[sure++] = e;
      ++reads;
    } else if (tier == kRam && vram(layer) && ahead_.note_copy(layer, e, level, depth)) {
      sorted_[sure++] = e;
    }
  }
  // Eager: a guess by the layer's own router is worth more than the past of a victim.
  const int64_t most = ahead_room(layer, sure);
  const int64_t fetches = planner_.prefetch(layer, sorted_.data(), sure, most, true);
  Read* const end = fetch(layer, fetches, true, a_.reads);
  const Fetch* const plan = planner_.fetches();
  for (int64_t i = 0; i < fetches; ++i) {
    a_.unproven.row(layer)[plan[i].expert] = int8_t(plan[i].source);
    a_.background.row(layer)[plan[i].expert] = false;
    if (plan[i].source == kNvme) ahead_.spend(layer, plan[i].expert, nbytes);
  }
  a_.counts->prefetch_issued = fetches;
  a_.counts->guesses_read = end - a_.reads;
  address(a_.reads, end, shape_.prefetch);
  return end - a_.reads;
}

}  // namespace fomoe::engine
