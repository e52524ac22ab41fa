// Python bindings of routing; every result goes into arrays of the caller.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <utility>
#include <vector>

#include "fomoe/native/array.h"
#include "groups.h"
#include "router.h"
#include "rules.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fomoe::routing {
namespace {

constexpr int64_t kMostExperts = 1 << 24;  // bounds the scratch of a counting sort

template <int N>
using Floats = Array<const float, N>;
template <int N>
using Ids = Array<int32_t, N>;

int64_t py_softmax(Floats<2> scores, Array<float, 2> out) {
  same("rows of out", out.shape(0), scores.shape(0));
  same("columns of out", out.shape(1), scores.shape(1));
  const int64_t n = scores.shape(1);
  for (int64_t t = 0; t < scores.shape(0); ++t) {
    float peak;
    if (!peak_of(scores.view().row(t), n, &peak)) return t;
    softmax_row(scores.view().row(t), n, peak, out.view().row(t));
  }
  return -1;
}

void check_k(int64_t k, int64_t n) {
  if (k < 1 || k > n)
    throw std::invalid_argument(std::to_string(k) + " experts per token of " + std::to_string(n));
}

int64_t py_route(Floats<2> scores, Ids<2> ids, Array<float, 2> weights) {
  const int64_t rows = scores.shape(0), n = scores.shape(1), k = ids.shape(1);
  check_k(k, n);
  same("rows of ids", ids.shape(0), rows);
  same("rows of weights", weights.shape(0), rows);
  same("columns of weights", weights.shape(1), k);
  Router router(n, k);
  for (int64_t t = 0; t < rows; ++t)
    if (!router.route(scores.view().row(t), ids.view().row(t), weights.view().row(t))) return t;
  return -1;
}

int64_t py_predict(Floats<2> scores, int64_t k, Ids<1> ids, Array<float, 1> margins) {
  const int64_t n = scores.shape(1);
  check_k(k, n);
  same("length of ids", ids.shape(0), n);
  same("length of margins", margins.shape(0), n);
  return Router(n, k).predict(scores.data(), scores.shape(0), ids.data(), margins.data());
}

int64_t py_group(Array<const int32_t, 2> ids, Ids<1> experts, Ids<1> pair_start, Ids<1> pair_token,
                 Ids<2> order, Ids<2> ranks) {
  const int64_t pairs = ids.size();
  same("length of experts", experts.shape(0), pairs);
  same("length of pair_start", pair_start.shape(0), pairs + 1);
  same("length of pair_token", pair_token.shape(0), pairs);
  same("size of order", order.size(), pairs);
  same("size of ranks", ranks.size(), pairs);
  int32_t greatest = -1;
  for (int64_t p = 0; p < pairs; ++p) {
    if (ids.data()[p] < 0 || ids.data()[p] >= kMostExperts)
      throw std::invalid_argument("expert id " + std::to_string(ids.data()[p]) + ", must be 0 to " +
                                  std::to_string(kMostExperts - 1));
    greatest = ids.data()[p] > greatest ? ids.data()[p] : greatest;
  }
  return Grouper().group(
      ids.data(), ids.shape(0), ids.shape(1), greatest + 1,
      {experts.data(), pair_start.data(), pair_token.data(), order.data(), ranks.data()});
}

RuleKind kind_of(const std::string& name) {
  if (name == "exact") return RuleKind::kExact;
  if (name == "cache_aware") return RuleKind::kCacheAware;
  if (name == "price") return RuleKind::kPrice;
  if (name == "drop") return RuleKind::kDrop;
  throw std::invalid_argument("no routing rule is called " + name);
}

void init_rule(Rule* self, const std::string& kind, float limit, float kappa, int64_t guarded,
               int64_t budget, std::vector<float> sensitivities) {
  new (self) Rule{kind_of(kind), kappa, guarded, budget, limit, std::move(sensitivities)};
}

int64_t py_choose(const Rule& rule, int64_t layer, Floats<2> scores, Array<const bool, 2> resident,
                  Ids<2> ids, Array<float, 2> weights, Array<bool, 2> substituted) {
  const int64_t rows = scores.shape(0), n = scores.shape(1), k = ids.shape(1);
  check_k(k, n);
  same("rows of the mask", resident.shape(0), rows);
  same("columns of the mask", resident.shape(1), n);
  same("rows of ids", ids.shape(0), rows);
  same("size of weights", weights.size(), rows * k);
  same("size of substituted", substituted.size(), rows * k);
  if (layer < 0 || (!rule.sensitivities.empty() && layer >= int64_t(rule.sensitivities.size())))
    throw nb::index_error(("no sensitivity of layer " + std::to_string(layer)).c_str());
  RuleRouter router(n, k);
  const float limit = rule.limit_of(layer, rule.limit);
  for (int64_t t = 0; t < rows; ++t) {
    if (!router.rank(scores.view().row(t))) return t;
    router.choose(rule, limit, resident.view().row(t),
                  {ids.view().row(t), weights.view().row(t), substituted.view().row(t)});
  }
  return -1;
}

}  // namespace
}  // namespace fomoe::routing

NB_MODULE(_routing, m) {
  using namespace fomoe::routing;
  if (_import_array() < 0) throw nb::python_error();
  m.def("softmax", &py_softmax, "scores"_a, "out"_a);
  m.def("route", &py_route, "scores"_a, "ids"_a, "weights"_a);
  m.def("predict", &py_predict, "scores"_a, "k"_a, "ids"_a, "margins"_a);
  m.def("group", &py_group, "ids"_a, "experts"_a, "pair_start"_a, "pair_token"_a, "order"_a,
        "ranks"_a);
  nb::class_<Rule>(m, "Rule").def("__init__", &init_rule, "kind"_a, "limit"_a, "kappa"_a,
                                  "guarded"_a, "budget"_a, "sensitivities"_a);
  m.def("choose", &py_choose, "rule"_a, "layer"_a, "scores"_a, "resident"_a, "ids"_a, "weights"_a,
        "substituted"_a);
}
