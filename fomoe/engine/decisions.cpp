#include "decisions.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "fomoe/routing/router.h"

namespace fomoe::engine {

using residency::LogicalCaches;
using routing::Outcome;
using routing::Rule;
using routing::RuleKind;
using routing::RuleRouter;

Decider::Decider(const LogicalCaches& caches, Rule rule, int64_t k, int64_t threads,
                 DecisionArrays own)
    : caches_(caches), rule_(std::move(rule)), k_(k), own_(own) {
  const int64_t n = caches.shape().experts;
  for (int64_t i = 0; i < threads; ++i)
    workers_.push_back({RuleRouter(n, k), LogicalCaches::Scratch(n)});
}

int64_t Decider::decide(int64_t layer, const DecisionInputs& in, const DecisionArrays& out) {
  float peak;
  if (!in.ids)
    for (int64_t i = 0; i < in.rows; ++i)
      if (!routing::peak_of(in.row(i), in.width, &peak)) return i;
  const int64_t workers = std::min<int64_t>(workers_.size(), in.rows);
  std::vector<std::thread> threads;
  for (int64_t w = 1; w < workers; ++w)
    threads.emplace_back([&, w] { decide_rows(layer, in, out, w); });
  if (workers) decide_rows(layer, in, out, 0);
  for (std::thread& t : threads) t.join();
  return -1;
}

void Decider::decide_rows(int64_t layer, const DecisionInputs& in, const DecisionArrays& out,
                          int64_t worker) {
  const int64_t workers = std::min<int64_t>(workers_.size(), in.rows);
  Worker& w = workers_[worker];
  for (int64_t i = in.rows * worker / workers; i < in.rows * (worker + 1) / workers; ++i) {
    const int64_t cell = caches_.cell(in.sequences[i], layer);
    const bool weighs = caches_.rules().eviction == residency::Eviction::kMass;
    if (in.ids) {
      w.router.rank(in.ids + i * in.width, in.row(i), in.width);
      if (weighs) caches_.weigh(cell, in.ids + i * in.width, in.row(i), in.width);
    } else {
      w.router.rank(in.row(i));
      if (weighs) caches_.weigh(cell, w.router.probabilities());
    }
    decide_row(layer, in.sequences[i], in.prices ? in.prices[i] : rule_.limit, out.at(i, k_), w);
  }
}

// The event of one token: the rule chooses, what it runs comes in, what it left out is filled.
void Decider::decide_row(int64_t layer, int64_t sequence, float strength,
                         const DecisionArrays& out, Worker& w) {
  const int64_t cell = caches_.cell(sequence, layer);
  const bool* const resident = caches_.resident(cell);
  const bool acts = !caches_.is_warming(cell);
  const Outcome o =
      w.router.choose(acts ? rule_ : exact_, rule_.limit_of(layer, strength), resident,
                      {out.ids, out.weights, out.substituted});
  const int32_t* const wanted = w.router.wanted();
  std::copy(wanted, wanted + k_, out.wanted);
  *out.lost = o.lost;
  int64_t* const counts = caches_.counts(cell);
  int64_t absent = 0;
  for (int64_t i = 0; i < k_; ++i) {
    counts[residency::kMissed] += !resident[wanted[i]];
    absent += out.ids[i] >= 0 && !resident[out.ids[i]];
  }
  caches_.want(cell, wanted, k_);
  caches_.run(cell, out.ids, k_, out.read, w.scratch);
  const int64_t demand = std::count(out.read, out.read + k_, true);
  counts[residency::kDemand] += demand;
  counts[residency::kJoined] += absent - demand;
  counts[residency::kSubstituted] += o.substituted;
  counts[residency::kDropped] += o.dropped;
  caches_.fill(cell, wanted, out.ids, k_, out.background);
  caches_.count_decoded(cell);
  out.tally[kReads] = demand;
  out.tally[kBackground] = k_ - std::count(out.background, out.background + k_, -1);
  out.tally[kSubstituted] = o.substituted;
  const bool priced = acts && rule_.kind == RuleKind::kPrice;
  caches_.close(cell, out.ids, k_, priced ? &strength : nullptr, w.scratch);
}

}  // namespace fomoe::engine
