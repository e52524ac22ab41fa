// Python bindings of offline scores: the optimum of a cache, and what choices lose.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <string>

#include "belady.h"
#include "fomoe/native/array.h"
#include "losses.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fomoe::sim {
namespace {

constexpr int64_t kLosses = 5;  // in the order of losses.LOSSES

void check_ids(Array<const int32_t, 2> ids, int32_t least, int64_t n_experts) {
  for (int64_t i = 0; i < ids.size(); ++i)
    if (ids.data()[i] < least || ids.data()[i] >= n_experts)
      throw nb::index_error(("no expert " + std::to_string(ids.data()[i])).c_str());
}

int64_t py_belady(Array<const int32_t, 2> ids, Array<const bool, 1> scored, int64_t capacity,
                  int64_t n_experts, Array<bool, 2> missed) {
  const int64_t tokens = ids.shape(0), k = ids.shape(1);
  same("length of scored", scored.size(), tokens);
  same("rows of missed", missed.shape(0), tokens);
  same("columns of missed", missed.shape(1), k);
  if (capacity < 0) throw std::invalid_argument("capacity " + std::to_string(capacity));
  check_ids(ids, 0, n_experts);
  nb::gil_scoped_release release;
  return Belady(n_experts).run(ids.data(), tokens, k, scored.data(), capacity, missed.data());
}

void py_losses(Array<const int32_t, 2> ids, Array<const float, 2> p, Array<const int32_t, 2> run,
               Array<const float, 2> weights, Array<double, 2> out) {
  const int64_t rows = ids.shape(0), c = ids.shape(1), k = run.shape(1);
  same("rows of p", p.shape(0), rows);
  same("columns of p", p.shape(1), c);
  same("rows of run", run.shape(0), rows);
  same("size of weights", weights.size(), run.size());
  same("rows of out", out.shape(0), rows);
  same("columns of out", out.shape(1), kLosses);
  if (k > c) throw std::invalid_argument("more experts run than there are candidates");
  nb::gil_scoped_release release;
  for (int64_t r = 0; r < rows; ++r) {
    const Losses l = losses_of(ids.data() + r * c, p.data() + r * c, c, k, run.data() + r * k,
                               weights.data() + r * k);
    const double values[kLosses] = {l.mass, l.left_out, l.squares, l.distance, l.router_kl};
    std::copy(values, values + kLosses, out.data() + r * kLosses);
  }
}

}  // namespace
}  // namespace fomoe::sim

NB_MODULE(_sim, m) {
  using namespace fomoe::sim;
  if (_import_array() < 0) throw nb::python_error();
  m.def("belady", &py_belady, "ids"_a, "scored"_a, "capacity"_a, "n_experts"_a, "missed"_a);
  m.def("losses", &py_losses, "ids"_a, "p"_a, "run"_a, "weights"_a, "out"_a);
}
