// Pieces that matmul.cpp and experts.cpp share: products of a slice, sizes of items.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "drive.h"

namespace fomoe::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Arithmetic counts like memory traffic from about four tokens on.
inline int64_t work_bytes(int64_t weight_bytes, int64_t tokens) {
  return weight_bytes * (1 + tokens / 4);
}

// Weights per item: small beside L2, large beside the taking of an item.
inline int64_t rows_per_item(int64_t row_bytes, int64_t tokens) {
  return std::max<int64_t>(1, 32 * 1024 / (row_bytes * (1 + tokens / 64)));
}

// Values per offset of a weight type, 0 where it has no offsets.
int offset_group(int type);

// Room for scale * sum(q) per group of each token, padded with zeros to whole chunks of 256 values.
struct SumRows {
  float* data;
  int64_t stride;
  int group;
};
SumRows sum_rows(Work purpose, int64_t tokens, int64_t cols, int group);
// Activations with their sums filled in.
QuantizedRows with_sums(const int8_t* q, const float* scale, int64_t tokens, int64_t cols,
                        const SumRows& sums);

void product_q8(int type, const Slice& slice, const QuantizedRows& x);
void product_f32(int type, const Slice& slice, const float* x, int64_t cols);

}  // namespace fomoe::cpu
