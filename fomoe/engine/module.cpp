// Python bindings of the wave planner; it works on the residency of fomoe.residency._residency.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "decisions.h"
#include "fomoe/native/array.h"
#include "waves.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fomoe::engine {
namespace {

template <class T, int N>
Array<T, N> field(nb::handle owner, const char* name) {
  return nb::cast<Array<T, N>>(owner.attr(name));
}

Segment segment_of(nb::handle s) {
  return {field<int32_t, 2>(s, "slot_of").view(),     field<int64_t, 1>(s, "holder").data(),
          field<int32_t, 1>(s, "layer_class").data(), field<int32_t, 1>(s, "class_first").data(),
          field<int32_t, 1>(s, "free_count").data(),  field<int32_t, 1>(s, "free_slots").data(),
          field<uint64_t, 1>(s, "generation").data(), field<int64_t, 1>(s, "address").data()};
}

std::optional<VramSlots> vram_of(nb::handle s, const Segment& segment, nb::handle arrays,
                                 const residency::State& state) {
  if (!nb::hasattr(s, "holds")) return {};
  const auto pool_first = field<int32_t, 1>(s, "pool_first");
  same("layers of a segment", pool_first.size(), state.n_layers);
  return VramSlots(segment, {field<int32_t, 1>(s, "users").data(),
                             field<int8_t, 1>(s, "reading").data(),
                             field<int64_t, 1>(s, "holds").data(),
                             field<uint64_t, 1>(s, "tickets").data(),
                             pool_first.data(),
                             field<int32_t, 1>(s, "staging").data(),
                             field<int32_t, 1>(s, "ahead").data(),
                             field<uint64_t, 1>(s, "ticket").data(),
                             field<int64_t, 1>(arrays, "expert_bytes").data()});
}

WaveArrays arrays_of(nb::handle a) {
  return {field<int32_t, 1>(a, "layer_node").data(),
          field<int32_t, 1>(a, "layer_device").data(),
          field<int64_t, 1>(a, "expert_bytes").data(),
          field<int8_t, 2>(a, "unproven").view(),
          field<bool, 2>(a, "background").view(),
          field<int32_t, 2>(a, "ids").data(),
          field<float, 2>(a, "weights").data(),
          field<int32_t, 1>(a, "experts").data(),
          field<int64_t, 1>(a, "pairs").data(),
          nb::cast<Records<Read>>(a.attr("reads")).data(),
          nb::cast<Records<Copy>>(a.attr("copies")).data(),
          field<int32_t, 1>(a, "arm").data(),
          reinterpret_cast<Counts*>(field<int64_t, 1>(a, "counts").data())};
}

AheadArrays ahead_of(nb::handle a, const residency::State& state) {
  const auto named = field<int64_t, 2>(a, "named"), wanted = field<int64_t, 2>(a, "wanted");
  const auto allowed = field<bool, 2>(a, "allowed");
  for (const int64_t rows : {named.shape(0), wanted.shape(0), allowed.shape(0)})
    same("depths of guesses", rows, kDepths);
  for (const int64_t columns : {named.shape(1), wanted.shape(1), allowed.shape(1)})
    same("levels of guesses", columns, kLevels);
  const auto charged = field<bool, 2>(a, "charged");
  same("layers of guesses", charged.shape(0), state.n_layers);
  same("experts of guesses", charged.shape(1), state.n_experts);
  return {named.view(),   wanted.view(), allowed.view(),
          charged.view(), field<int64_t, 1>(a, "misses").data(),
          field<int64_t, 1>(a, "credit").data()};
}

void init_planner(WavePlanner* self, residency::Planner& planner, nb::list segments,
                  nb::object arrays, nb::object ahead, nb::object priorities) {
  std::vector<Segment> all;
  std::vector<std::optional<VramSlots>> vram;
  for (const nb::handle s : segments) {
    all.push_back(segment_of(s));
    vram.push_back(vram_of(s, all.back(), arrays, planner.state()));
  }
  const auto ids = field<int32_t, 2>(arrays, "ids");
  const int64_t n = planner.state().n_experts;
  same("counts", field<int64_t, 1>(arrays, "counts").size() * 8, int64_t(sizeof(Counts)));
  same("room for reads", nb::cast<Records<Read>>(arrays.attr("reads")).size(), 2 * n);
  same("room for copies", nb::cast<Records<Copy>>(arrays.attr("copies")).size(), 4 * n);
  same("length of arm", field<int32_t, 1>(arrays, "arm").size(), ids.shape(1) + 1);
  same("room for experts", field<int32_t, 1>(arrays, "experts").size(), n);
  same("room for pairs", field<int64_t, 1>(arrays, "pairs").size(), n);
  const auto priority = [&](const char* name) { return nb::cast<int32_t>(priorities.attr(name)); };
  new (self) WavePlanner(
      planner, std::move(all), std::move(vram), arrays_of(arrays), ahead_of(ahead, planner.state()),
      {ids.shape(0), ids.shape(1), nb::cast<int64_t>(ahead.attr("budget_permille")),
       priority("demand"), priority("prefetch"), priority("background")});
}

void init_arrays(StepArrays* self, Array<int32_t, 2> order, Array<float, 2> weights,
                 Array<int32_t, 1> pair_token, Array<int32_t, 1> pair_start,
                 Records<Entry> entries) {
  const int64_t tokens = order.shape(0), k = order.shape(1);
  same("rows of weights", weights.shape(0), tokens);
  same("columns of weights", weights.shape(1), k);
  same("length of pair_token", pair_token.size(), tokens * k);
  same("length of pair_start", pair_start.size(), entries.size() + 1);
  new (self) StepArrays{order.data(),
                        weights.data(),
                        pair_token.data(),
                        pair_start.data(),
                        entries.data(),
                        tokens,
                        k,
                        entries.size()};
}

void check(const WavePlanner& w, int32_t layer, int64_t tokens, int64_t n_experts) {
  const residency::State& s = w.state();
  if (layer < 0 || layer >= s.n_layers) throw nb::index_error("no such layer");
  if (tokens > w.shape().max_tokens)
    throw nb::index_error(("a step of " + std::to_string(tokens) + " tokens, at most " +
                           std::to_string(w.shape().max_tokens) + " fit")
                              .c_str());
  same("experts of a layer", n_experts, s.n_experts);
}

void check_room(const WavePlanner& w, int64_t tokens, const StepArrays& out) {
  const int64_t n = std::min<int64_t>(tokens * w.shape().top_k, w.state().n_experts);
  same("experts per token of the step's arrays", out.k, w.shape().top_k);
  if (tokens > out.max_tokens || n > out.max_experts)
    throw nb::index_error("the step does not fit its arrays");
}

int64_t py_decide(WavePlanner& w, int32_t layer, Array<const float, 2> scores,
                  Array<int64_t, 1> tokens, Array<uint64_t, 1> hash, const StepArrays& out) {
  check(w, layer, scores.shape(0), scores.shape(1));
  check_room(w, scores.shape(0), out);
  same("layers of a token count", tokens.size(), w.state().n_layers);
  same("words of a hash", hash.size(), 1);
  w.ask_for(layer);
  const int64_t broken = w.route(scores.data(), scores.shape(0));
  if (broken >= 0) return -1 - broken;
  w.observe(layer, scores.shape(0), {tokens.data(), hash.data()});
  w.begin(layer, scores.shape(0), nullptr, out);
  return w.wave();
}

int64_t py_place(WavePlanner& w, int32_t layer, Array<const int32_t, 2> ids,
                 Array<const float, 2> weights, Array<const bool, 2> substituted,
                 const StepArrays& out) {
  const int64_t tokens = ids.shape(0), pairs = ids.size();
  check(w, layer, tokens, w.state().n_experts);
  check_room(w, tokens, out);
  same("experts per token", ids.shape(1), w.shape().top_k);
  same("size of weights", weights.size(), pairs);
  same("size of substituted", substituted.size(), pairs);
  for (int64_t p = 0; p < pairs; ++p)
    if (ids.data()[p] < 0 || ids.data()[p] >= w.state().n_experts)
      throw nb::index_error("no such expert");
  w.take(ids.data(), weights.data(), pairs);
  w.begin(layer, tokens, substituted.data(), out);
  return w.wave();
}

int64_t py_read_later(WavePlanner& w, int32_t layer, Array<const int32_t, 1> experts) {
  check(w, layer, 0, w.state().n_experts);
  if (experts.size() > w.state().n_experts) throw nb::index_error("too many reads");
  w.clear();
  return w.read_later(layer, experts.data(), experts.size(), 0);
}

// One sequence's token by its rule: the decision, the step and what is read later, in one call.
int64_t py_decide_by(WavePlanner& w, int32_t layer, Array<const float, 2> scores, Decider& decider,
                     std::optional<Array<const float, 1>> prices, const StepArrays& out) {
  check(w, layer, scores.shape(0), scores.shape(1));
  check_room(w, scores.shape(0), out);
  const residency::LogicalShape& s = decider.caches().shape();
  same("tokens of a decision", scores.shape(0), 1);
  same("sequences of the decider", s.sequences, 1);
  same("layers of the decider", s.layers, w.state().n_layers);
  same("experts of the decider", s.experts, w.state().n_experts);
  same("experts per token of the decider", decider.k(), w.shape().top_k);
  if (prices) same("number of prices", prices->size(), 1);
  if (decider.rule().kind == routing::RuleKind::kDrop)
    throw std::invalid_argument("a step runs k experts, a rule that drops some cannot plan it");
  const int32_t sequence = 0;
  const DecisionInputs in{&sequence, prices ? prices->data() : nullptr, scores.data(), nullptr, 1,
                          scores.shape(1)};
  w.ask_for(layer);
  decider.caches().ask_for(decider.caches().cell(sequence, layer));
  const DecisionArrays& made = decider.own();
  if (decider.decide(layer, in, made) >= 0) return -1;
  w.take(made.ids, made.weights, decider.k());
  w.begin(layer, 1, made.substituted, out);
  const int64_t reads = w.wave(), later = made.tally[kBackground];
  return later ? w.read_later(layer, made.background, later, reads) : reads;
}

void py_picks(const WavePlanner& w, Array<int32_t, 1> ids, Array<float, 1> weights) {
  same("experts of a token", ids.size(), w.shape().top_k);
  same("weights of a token", weights.size(), w.shape().top_k);
  if (w.n_experts() != w.shape().top_k) throw Bug("no step of one token has begun");
  w.picks(ids.data(), weights.data());
}

int64_t py_look_ahead(WavePlanner& w, int32_t layer, Array<const float, 2> scores,
                      int32_t depth) {
  check(w, layer, 0, scores.shape(1));
  if (depth < 1 || depth > kDepths) throw nb::index_error("guesses reach one or two layers ahead");
  return w.look_ahead(layer, depth - 1, scores.data(), scores.shape(0));
}

void py_answered(WavePlanner& w, int32_t device, bool aborted) {
  if (device < 0 || device >= w.n_devices()) throw nb::index_error("no such device");
  w.answered(device, aborted);
}

bool py_is_tight(const WavePlanner& w, int32_t layer) {
  check(w, layer, 0, w.state().n_experts);
  return w.is_tight(layer);
}

void py_ended(WavePlanner& w, Records<Copy> copies) {
  for (int64_t i = 0; i < copies.size(); ++i) {
    const Copy& copy = copies.data()[i];
    check(w, copy.layer, 0, w.state().n_experts);
    if (copy.expert < 0 || copy.expert >= w.state().n_experts)
      throw nb::index_error("no such expert");
    w.ended(copy);
  }
}

void check_slot(int32_t slot, int64_t n_slots) {
  if (slot < 0 || slot >= n_slots)
    throw nb::index_error(("slot " + std::to_string(slot) + " of " + std::to_string(n_slots) +
                           " is not there").c_str());
}

int64_t py_landed(Array<const uint64_t, 1> words, Records<Entry> entries,
                  Array<uint8_t, 1> ready) {
  same("length of ready", ready.size(), entries.size());
  int64_t count = 0;
  for (int64_t i = 0; i < entries.size(); ++i) {
    const Entry& e = entries.data()[i];
    check_slot(e.slot, words.size());
    ready.data()[i] = __atomic_load_n(words.data() + e.slot, __ATOMIC_ACQUIRE) >= e.generation;
    count += ready.data()[i];
  }
  return count;
}

void py_part_addresses(Array<const uint64_t, 2> parts, Records<Entry> entries,
                       Array<uint64_t, 2> out) {
  const int64_t n = entries.size(), kinds = parts.shape(0), all = parts.shape(1);
  same("rows of out", out.shape(0), kinds);
  same("columns of out", out.shape(1), n);
  for (int64_t i = 0; i < n; ++i) {
    const Entry& e = entries.data()[i];
    if (e.expert < 0 || e.expert >= all) throw nb::index_error("no such expert");
    for (int64_t k = 0; k < kinds; ++k)
      out.data()[k * n + i] =
          parts.data()[k * all + e.expert] + static_cast<uint64_t>(e.address);
  }
}

DecisionArrays decisions_of(nb::handle out, int64_t rows, int64_t k) {
  const auto pairs = [&](auto array, const char* name) {
    same(name, array.shape(0), rows);
    same(name, array.shape(1), k);
    return array.data();
  };
  const auto lost = field<float, 1>(out, "lost");
  const auto tally = field<int64_t, 2>(out, "tally");
  same("length of lost", lost.size(), rows);
  same("size of tally", tally.size(), rows * kTallies);
  return {pairs(field<int32_t, 2>(out, "ids"), "size of ids"),
          pairs(field<float, 2>(out, "weights"), "size of weights"),
          pairs(field<bool, 2>(out, "substituted"), "size of substituted"),
          pairs(field<bool, 2>(out, "read"), "size of read"),
          pairs(field<int32_t, 2>(out, "wanted"), "size of wanted"),
          pairs(field<int32_t, 2>(out, "background"), "size of background"),
          lost.data(),
          tally.data()};
}

void init_decider(Decider* self, const residency::LogicalCaches& caches, const routing::Rule& rule,
                  int64_t k, int64_t threads, nb::handle own) {
  const residency::LogicalShape& s = caches.shape();
  if (k < 1 || k > s.capacity) throw std::invalid_argument("k does not fit the caches");
  if (threads < 1) throw std::invalid_argument("a decider needs a thread");
  if (!rule.sensitivities.empty())
    same("layer sensitivities", int64_t(rule.sensitivities.size()), s.layers);
  new (self) Decider(caches, rule, k, threads, decisions_of(own, s.sequences, k));
}

// Rows must name different sequences: threads share nothing.
void check_sequences(const residency::LogicalShape& s, const Array<const int32_t, 1>& sequences) {
  std::vector<uint8_t> seen(s.sequences);
  for (int64_t i = 0; i < sequences.size(); ++i) {
    const int32_t row = sequences.data()[i];
    if (row < 0 || row >= s.sequences)
      throw nb::index_error(("sequence " + std::to_string(row) + " of " +
                             std::to_string(s.sequences)).c_str());
    if (seen[row]++)
      throw std::invalid_argument("sequence " + std::to_string(row) + " has two rows");
  }
}

int64_t py_decide_rows(Decider& d, int64_t layer, Array<const float, 2> scores,
                       std::optional<Array<const int32_t, 2>> ids,
                       Array<const int32_t, 1> sequences,
                       std::optional<Array<const float, 1>> prices, nb::object out) {
  const residency::LogicalShape& s = d.caches().shape();
  const int64_t rows = scores.shape(0), width = scores.shape(1);
  if (layer < 0 || layer >= s.layers) throw nb::index_error("no such layer");
  same("number of sequences", sequences.size(), rows);
  check_sequences(s, sequences);
  if (prices) same("number of prices", prices->size(), rows);
  if (!ids) same("experts of a layer", width, s.experts);
  if (ids) {
    same("rows of ids", ids->shape(0), rows);
    same("columns of ids", ids->shape(1), width);
    if (width < d.k()) throw std::invalid_argument("heads must have at least k experts");
    for (int64_t i = 0; i < ids->size(); ++i)
      if (ids->data()[i] < 0 || ids->data()[i] >= s.experts)
        throw nb::index_error("no such expert");
  }
  const DecisionArrays arrays = out.is_none() ? d.own() : decisions_of(out, rows, d.k());
  const DecisionInputs in{sequences.data(), prices ? prices->data() : nullptr, scores.data(),
                          ids ? ids->data() : nullptr, rows, width};
  nb::gil_scoped_release released;
  return d.decide(layer, in, arrays);
}

}  // namespace
}  // namespace fomoe::engine

NB_MODULE(_engine, m) {
  using namespace fomoe::engine;
  if (_import_array() < 0) throw nb::python_error();
  nb::set_leak_warnings(false);  // actors freeze the garbage collector

  m.def("landed", &py_landed, "words"_a, "entries"_a, "ready"_a);
  m.def("part_addresses", &py_part_addresses, "parts"_a, "entries"_a, "out"_a);

  nb::class_<Decider>(m, "Decider")
      .def("__init__", &init_decider, "caches"_a, "rule"_a, "k"_a, "threads"_a, "own"_a,
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 6>())
      .def("decide", &py_decide_rows, "layer"_a, "scores"_a, "ids"_a.none(), "sequences"_a,
           "prices"_a.none(), "out"_a.none());
  nb::class_<StepArrays>(m, "StepArrays")
      .def("__init__", &init_arrays, "order"_a, "weights"_a, "pair_token"_a, "pair_start"_a,
           "entries"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(),
           nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>());
  nb::class_<WavePlanner>(m, "WavePlanner")
      .def("__init__", &init_planner, "planner"_a, "segments"_a, "arrays"_a, "ahead"_a,
           "priorities"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
           nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
      .def("decide", &py_decide, "layer"_a, "scores"_a, "tokens"_a, "decision_hash"_a, "out"_a)
      .def("decide_by", &py_decide_by, "layer"_a, "scores"_a, "decider"_a, "prices"_a.none(),
           "out"_a)
      .def("read_later", &py_read_later, "layer"_a, "experts"_a)
      .def("place", &py_place, "layer"_a, "ids"_a, "weights"_a, "substituted"_a, "out"_a)
      .def("picks", &py_picks, "ids"_a, "weights"_a)
      .def("wave", &WavePlanner::wave)
      .def("answered", &py_answered, "device"_a, "aborted"_a)
      .def("is_tight", &py_is_tight, "layer"_a)
      .def("ended", &py_ended, "copies"_a)
      .def("give_up_guesses", &WavePlanner::give_up_guesses)
      .def("look_ahead", &py_look_ahead, "layer"_a, "scores"_a, "depth"_a)
      .def_prop_ro("first", &WavePlanner::first)
      .def_prop_ro("end", &WavePlanner::end)
      .def_prop_ro("n_experts", &WavePlanner::n_experts)
      .def_prop_ro("step_copies", &WavePlanner::step_copies)
      .def_prop_ro("ahead_copies", &WavePlanner::ahead_copies);
}
