// A row of router scores cut down to its best candidates, as a trace keeps it; rows.py has the
// contract, reference.py the same in Python.
#pragma once

#include <cstdint>
#include <vector>

namespace fomoe::traces {

// Cuts rows of one length with scratch of its own.
class Reducer {
 public:
  Reducer(int64_t n_experts, int64_t candidates)
      : n_(n_experts), c_(candidates), p_(n_experts), bins_(n_experts), keys_(n_experts) {}

  int64_t n_experts() const { return n_; }
  int64_t candidates() const { return c_; }

  // ids [C] and their softmax probabilities [C], best rank first, and what the others have
  // together. False if the row is not finite.
  bool reduce(const float* scores, uint16_t* ids, float* probabilities, float* tail);

 private:
  static constexpr int32_t kBins = 256;

  int64_t collect(const float* scores, float peak);

  int64_t n_, c_;
  std::vector<float> p_;
  std::vector<uint8_t> bins_;
  std::vector<uint64_t> keys_;
};

}  // namespace fomoe::traces
