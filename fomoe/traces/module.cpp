// Python bindings of the trace recorder's one native call.
#include <nanobind/nanobind.h>

#include <string>

#include "fomoe/native/array.h"
#include "reduce.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fomoe::traces {
namespace {

constexpr int64_t kMostExperts = 1 << 16;  // ids have 16 bits

void init(Reducer* self, int64_t n_experts, int64_t candidates) {
  if (candidates < 1 || candidates > n_experts || n_experts > kMostExperts)
    throw std::invalid_argument(std::to_string(candidates) + " candidates of " +
                                std::to_string(n_experts));
  new (self) Reducer(n_experts, candidates);
}

int64_t py_reduce(Reducer& self, Array<const float, 2> scores, int64_t layer,
                  Array<uint16_t, 3> ids, Array<float, 3> probabilities, Array<float, 2> tail) {
  const int64_t tokens = scores.shape(0), n = self.n_experts(), c = self.candidates();
  const int64_t layers = ids.shape(0), room = ids.shape(1);
  same("experts of a row", scores.shape(1), n);
  same("candidates of ids", ids.shape(2), c);
  same("size of probabilities", probabilities.size(), ids.size());
  same("size of tail", tail.size(), layers * room);
  if (layer < 0 || layer >= layers) throw nb::index_error("no such layer");
  if (tokens > room)
    throw nb::index_error(("room for " + std::to_string(room) + " tokens, not for " +
                           std::to_string(tokens)).c_str());
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = layer * room + t;
    if (!self.reduce(scores.data() + t * n, ids.data() + at * c, probabilities.data() + at * c,
                     tail.data() + at))
      return t;
  }
  return -1;
}

}  // namespace
}  // namespace fomoe::traces

NB_MODULE(_traces, m) {
  using namespace fomoe::traces;
  if (_import_array() < 0) throw nb::python_error();
  nb::set_leak_warnings(false);  // actors freeze the garbage collector
  nb::class_<Reducer>(m, "Reducer")
      .def("__init__", &init, "n_experts"_a, "candidates"_a)
      .def("reduce", &py_reduce, "scores"_a, "layer"_a, "ids"_a, "probabilities"_a, "tail"_a);
}
