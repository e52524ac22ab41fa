// Python bindings of the residency's rules over the arrays of state.py, and of the logical cache.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fomoe/native/array.h"
#include "logical.h"
#include "planner.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fomoe::residency {
namespace {

// A policy written in Python: asked for the worth of a whole row.
class PythonWorth : public Worth {
 public:
  explicit PythonWorth(nb::object policy) : policy_(std::move(policy)) {}

  void values(const History& history, int32_t layer, const int32_t* experts, int64_t n,
              double* out) override {
    const nb::handle owner(static_cast<PyObject*>(history.owner));
    const nb::object row = policy_.attr("values")(owner.attr("uses")[layer],
                                                  owner.attr("last")[layer], history.steps[layer]);
    const auto worth = nb::cast<Array<const double, 1>>(row);
    same("length of a policy's values", worth.size(), history.uses.width);
    for (int64_t i = 0; i < n; ++i) out[i] = worth.data()[experts[i]];
  }

 private:
  const nb::object policy_;
};

std::unique_ptr<Worth> worth_of(const nb::object& policy) {
  const nb::object rule = policy.attr("native_rule");
  if (rule.is_none()) return std::make_unique<PythonWorth>(policy);
  const std::string name = nb::cast<std::string>(rule);
  if (name == "lru") return std::make_unique<LruWorth>();
  if (name == "lfru") return std::make_unique<LfruWorth>();
  throw std::invalid_argument("no native eviction rule is called " + name);
}

template <class T, int N>
View<T> field(nb::handle owner, const char* name) {
  return nb::cast<Array<T, N>>(owner.attr(name)).view();
}

Table table_of(nb::handle t) {
  return {field<int32_t, 2>(t, "slot_of"),           field<int32_t, 1>(t, "held").data,
          field<int32_t, 1>(t, "quota").data,        field<int32_t, 1>(t, "size").data,
          field<int32_t, 1>(t, "pool").data,         field<int32_t, 1>(t, "members").data,
          field<int32_t, 1>(t, "member_start").data, field<int32_t, 1>(t, "free_slots").data,
          field<int32_t, 1>(t, "free_count").data,   field<int32_t, 1>(t, "free_start").data};
}

History history_of(nb::handle h) {
  return {field<int64_t, 2>(h, "uses"), field<int64_t, 2>(h, "last"),
          field<int64_t, 1>(h, "steps").data, h.ptr()};
}

Flags flags_of(nb::handle f) {
  return {field<bool, 2>(f, "pinned"),           field<bool, 2>(f, "awaited"),
          field<bool, 2>(f, "unused"),           field<bool, 2>(f, "last_wanted"),
          field<int32_t, 1>(f, "n_pinned").data, field<int32_t, 1>(f, "n_awaited").data};
}

Counters counters_of(nb::handle c) {
  const auto by_layer = [&](const char* name) { return field<int64_t, 1>(c, name).data; };
  return {field<int64_t, 2>(c, "lookups"),
          field<int64_t, 2>(c, "prefetches"),
          by_layer("prefetch_used"),
          by_layer("prefetch_wasted"),
          by_layer("evictions"),
          by_layer("demotions"),
          by_layer("ram_drops")};
}

void init_planner(Planner* self, nb::object state, nb::object plan, nb::object policy,
                  bool is_exclusive) {
  const nb::object device = state.attr("device");
  const auto slots = nb::cast<Array<int32_t, 2>>(device.attr("slot_of"));
  const State s{int32_t(slots.shape(0)),
                int32_t(slots.shape(1)),
                table_of(device),
                table_of(state.attr("ram")),
                history_of(state.attr("history")),
                history_of(state.attr("ram_history")),
                flags_of(state.attr("flags")),
                counters_of(state.attr("counters"))};
  const PlanArrays out{field<int32_t, 1>(plan, "hits").data,
                       field<int32_t, 1>(plan, "hit_slots").data,
                       nb::cast<Records<Fetch>>(plan.attr("fetches")).data()};
  new (self) Planner(s, out, worth_of(policy), is_exclusive);
}

using Ids = Array<const int32_t, 1>;

// Layers and experts come from inside the program; one out of range would write past the tables.
void check_layer(const Planner& p, int64_t layer) {
  if (layer < 0 || layer >= p.state().n_layers)
    throw nb::index_error(
        ("layer " + std::to_string(layer) + " of " + std::to_string(p.state().n_layers)).c_str());
}

void check_experts(const Planner& p, const Ids& experts) {
  for (int64_t i = 0; i < experts.size(); ++i)
    if (experts.data()[i] < 0 || experts.data()[i] >= p.state().n_experts)
      throw nb::index_error(("expert " + std::to_string(experts.data()[i]) + " of " +
                             std::to_string(p.state().n_experts))
                                .c_str());
}

int64_t py_plan(Planner& p, int32_t layer, Ids wanted, std::optional<Ids> in_ram) {
  check_layer(p, layer);
  if (!in_ram) return p.plan(layer, wanted.data(), wanted.size());
  return p.plan(layer, wanted.data(), wanted.size(), in_ram->data(), in_ram->size());
}

void py_drop_demoted(Planner& p, int32_t layer, int32_t expert) {
  check_layer(p, layer);
  if (expert < 0 || expert >= p.state().n_experts || p.state().ram.slot(layer, expert) < 0)
    throw nb::index_error("no such expert in RAM");
  p.drop_demoted(layer, expert);
}

int64_t py_prefetch(Planner& p, int32_t layer, Ids candidates, int64_t limit, bool eager) {
  check_layer(p, layer);
  check_experts(p, candidates);
  return p.prefetch(layer, candidates.data(), candidates.size(), limit, eager);
}

void py_release(Planner& p, int32_t layer) {
  check_layer(p, layer);
  p.release(layer);
}

void py_release_some(Planner& p, int32_t layer, Ids experts) {
  check_layer(p, layer);
  check_experts(p, experts);
  p.release(layer, experts.data(), experts.size());
}

void py_forget(Planner& p, int32_t layer, Ids experts) {
  check_layer(p, layer);
  check_experts(p, experts);
  p.forget(layer, experts.data(), experts.size());
}

bool py_recall(Planner& p, int32_t layer, int32_t expert) {
  check_layer(p, layer);
  if (expert < 0 || expert >= p.state().n_experts)
    throw std::invalid_argument("expert " + std::to_string(expert) + " of " +
                                std::to_string(p.state().n_experts));
  return p.recall(layer, expert);
}

void py_follow(Planner& p, std::optional<Array<const bool, 2>> resident) {
  if (!resident) return p.follow(nullptr);
  same("layers that are followed", resident->shape(0), p.state().n_layers);
  same("experts that are followed", resident->shape(1), p.state().n_experts);
  p.follow(resident->data());
}

int64_t py_capacity(const Planner& p, int32_t layer) {
  check_layer(p, layer);
  return p.capacity(layer);
}

int64_t py_observe(int32_t layer, Array<const int32_t, 2> ids, Array<int64_t, 1> tokens,
                   Array<uint64_t, 1> hash) {
  if (layer < 0 || layer >= tokens.size()) throw nb::index_error("no such layer");
  return observe(layer, ids.data(), ids.shape(0), ids.shape(1), {tokens.data(), hash.data()});
}

Eviction eviction_of(const std::string& name) {
  if (name == "lru") return Eviction::kLru;
  if (name == "lfru") return Eviction::kLfru;
  if (name == "mass") return Eviction::kMass;
  throw std::invalid_argument("no eviction of a logical cache is called " + name);
}

void init_logical(LogicalCaches* self, nb::object owner, nb::object rules) {
  const auto resident = nb::cast<Array<bool, 3>>(owner.attr("resident"));
  const auto members = nb::cast<Array<int32_t, 3>>(owner.attr("members"));
  const auto flight = nb::cast<Array<int32_t, 3>>(owner.attr("flight"));
  const auto number = [&](const char* name) { return nb::cast<int64_t>(rules.attr(name)); };
  const nb::object backfill = rules.attr("backfill");
  const LogicalShape shape{resident.shape(0), resident.shape(1), resident.shape(2),
                           members.shape(2), flight.shape(2)};
  const LogicalRules r{eviction_of(nb::cast<std::string>(rules.attr("eviction"))),
                       number("shift"),
                       nb::cast<int64_t>(backfill.attr("numerator")),
                       nb::cast<int64_t>(backfill.attr("denominator")),
                       number("delay"),
                       number("warmup")};
  const auto counters = nb::cast<Array<int64_t, 3>>(owner.attr("counters"));
  same("counts of a layer", counters.shape(2), kLogicalCounts);
  const LogicalArrays a{resident.data(),
                        members.data(),
                        field<int32_t, 2>(owner, "held").data,
                        field<uint32_t, 3>(owner, "weight").data,
                        field<int32_t, 3>(owner, "last").data,
                        field<int64_t, 2>(owner, "tokens").data,
                        field<int64_t, 2>(owner, "decoded").data,
                        field<uint64_t, 1>(owner, "hashes").data,
                        field<int64_t, 2>(owner, "credit").data,
                        flight.data(),
                        field<int64_t, 3>(owner, "due").data,
                        field<int32_t, 2>(owner, "flying").data,
                        counters.data(),
                        field<uint64_t, 1>(owner, "decay").data,
                        field<uint64_t, 1>(owner, "quotient").data,
                        nb::cast<Array<uint64_t, 1>>(owner.attr("decay")).size()};
  new (self) LogicalCaches(shape, r, a);
}

void py_commit(const LogicalCaches& caches, int64_t layer, Array<const int32_t, 3> ids,
               Array<const int32_t, 1> rows, Array<const float, 3> probabilities) {
  const LogicalShape& s = caches.shape();
  const int64_t tokens = ids.shape(1), k = ids.shape(2);
  if (layer < 0 || layer >= s.layers) throw nb::index_error("no such layer");
  same("sequences of ids", ids.shape(0), rows.size());
  for (int64_t i = 0; i < rows.size(); ++i)
    if (rows.data()[i] < 0 || rows.data()[i] >= s.sequences)
      throw nb::index_error("no such sequence");
  for (int64_t i = 0; i < ids.size(); ++i)
    if (ids.data()[i] < 0 || ids.data()[i] >= s.experts) throw nb::index_error("no such expert");
  const bool weighs = caches.rules().eviction == Eviction::kMass;
  if (weighs) same("size of probabilities", probabilities.size(), rows.size() * tokens * s.experts);
  LogicalCaches::Scratch scratch(s.experts);
  std::vector<uint8_t> read(k);
  for (int64_t i = 0; i < rows.size(); ++i) {
    const int64_t cell = caches.cell(rows.data()[i], layer);
    for (int64_t t = 0; t < tokens; ++t) {
      const int32_t* const token = ids.data() + (i * tokens + t) * k;
      if (weighs) caches.weigh(cell, probabilities.data() + (i * tokens + t) * s.experts);
      caches.want(cell, token, k);
      caches.run(cell, token, k, reinterpret_cast<bool*>(read.data()), scratch);
      caches.close(cell, token, k, nullptr, scratch);
    }
  }
}

}  // namespace
}  // namespace fomoe::residency

NB_MODULE(_residency, m) {
  using namespace fomoe::residency;
  if (_import_array() < 0) throw nb::python_error();
  nb::set_leak_warnings(false);  // actors freeze the garbage collector
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const fomoe::Bug& e) {
      PyErr_SetString(PyExc_AssertionError, e.what());
    }
  });

  nb::class_<Planner>(m, "Planner")
      .def("__init__", &init_planner, "state"_a, "plan"_a, "policy"_a, "is_exclusive"_a,
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def("plan", &py_plan, "layer"_a, "wanted"_a, "in_ram"_a.none() = nb::none())
      .def("drop_demoted", &py_drop_demoted, "layer"_a, "expert"_a)
      .def("prefetch", &py_prefetch, "layer"_a, "candidates"_a, "limit"_a, "eager"_a)
      .def("release", &py_release, "layer"_a)
      .def("release_some", &py_release_some, "layer"_a, "experts"_a)
      .def("forget", &py_forget, "layer"_a, "experts"_a)
      .def("recall", &py_recall, "layer"_a, "expert"_a)
      .def("capacity", &py_capacity, "layer"_a)
      .def("follow", &py_follow, nb::arg("resident").none());
  m.def("observe", &py_observe, "layer"_a, "ids"_a, "tokens"_a, "decision_hash"_a);
  nb::class_<LogicalCaches>(m, "LogicalCaches")
      .def("__init__", &init_logical, "owner"_a, "rules"_a)
      .def("commit", &py_commit, "layer"_a, "ids"_a, "rows"_a, "probabilities"_a);
}
