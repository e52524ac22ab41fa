// The exact router: selection, softmax and weights of one token's scores.
//
// All arithmetic is float32 in the order written here, without fused steps, so that the bits are
// those of fomoe/routing/reference.py on every instruction set.
#pragma once

#include <cstdint>
#include <vector>

namespace fomoe::routing {

// Lanes of the sum over a row: value i goes to lane i mod 16, lanes are then added as a tree.
constexpr int kLanes = 16;

// The greatest of a row. False if it is not a finite number, or the row holds NaN or +inf.
bool peak_of(const float* scores, int64_t n, float* peak);

// Softmax over n scores whose greatest is `peak`; returns the sum that the powers were divided by.
void softmax_row(const float* scores, int64_t n, float peak, float* out);

// Ids of the k greatest, greatest first, at equal scores the lower id. `best` has room for k.
void select_best(const float* scores, int64_t n, int64_t k, float* best, int32_t* ids);

// Routes rows of one length with scratch of its own.
class Router {
 public:
  Router(int64_t n_experts, int64_t k) : n_(n_experts), k_(k), p_(n_experts), best_(k + 1) {}

  int64_t n_experts() const { return n_; }
  int64_t k() const { return k_; }

  // ids [k] and weights [k], best rank first. False if the row is not finite.
  bool route(const float* scores, int32_t* ids, float* weights);

  // Ranks the union of the rows' k best by margin, then lower id, into ids [n] and margins [n];
  // returns how many, or -1 - row for a row that is not finite. An expert's margin is how far its
  // probability lies above that of the row's rank k + 1, over the sum of the k best; its greatest.
  int64_t predict(const float* scores, int64_t rows, int32_t* ids, float* margins);

 private:
  int64_t n_, k_;
  std::vector<float> p_, best_, margins_;  // margins_ by expert, over the rows
  std::vector<uint8_t> is_chosen_;
};

}  // namespace fomoe::routing
