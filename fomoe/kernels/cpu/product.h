// Pieces that matmul.cpp and experts.cpp share: prepared activations, sizes of items.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "drive.h"

namespace fomoe::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Arithmetic counts like memory traffic from about four tokens on.
inline int64_t work_bytes(int64_t weight_bytes, int64_t tokens) {
  return weight_bytes * (1 + tokens / 4);
}

// Weights per item: small beside L2, large beside the taking of an item.
inline int64_t rows_per_item(int64_t row_bytes, int64_t tokens) {
  return std::max<int64_t>(1, 32 * 1024 / (row_bytes * (1 + tokens / 64)));
}

constexpr int64_t kPanelRows = 16;  // items of panels are multiples of the largest panel

// Rows per item where tokens lie in tiles: enough items for the threads to share, but no more, for
// each item reads all tiles.
int64_t panel_rows_per_item(int64_t rows, int64_t matrices);

// Tokens whose tiles stay in L2 while the panels go by.
int64_t tokens_per_block(int64_t cols, int group);

// Room for the sums of QuantizedRows, padded with zeros to whole chunks of 256 values.
struct SumRows {
  float* data;
  int64_t stride;
  QuantShape shape;
};
SumRows sum_rows(Work purpose, int64_t tokens, int64_t cols, QuantShape shape);
// Activations with their sums filled in.
QuantizedRows with_sums(const int8_t* q, const float* scale, int64_t tokens, int64_t cols,
                        const SumRows& sums);
// Whether two weight types want the same sums and tiles.
inline bool same_input(QuantShape a, QuantShape b) {
  return a.group == b.group && a.bias == b.bias && a.has_offset == b.has_offset;
}

// At most kRowTokens tokens.
void product_rows(int type, const Slice& slice, const QuantizedRows& x);
void product_tiles(int type, const Slice& slice, const uint8_t* tiles, int64_t cols);
void product_f32(int type, const Slice& slice, const float* x, int64_t cols);

}  // namespace fomoe::cpu
