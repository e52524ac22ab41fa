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

// In float32 a block of tokens and the rows of an item share L2: this much for each.
constexpr int64_t kFloatBytes = 256 * 1024;
int64_t float_rows_per_item(int64_t rows, int64_t cols);

// Tokens whose tiles stay in L2 while the panels go by.
int64_t tokens_per_block(int64_t cols, int group);

constexpr int64_t kRowTokens = 4;  // from more tokens on, panels are faster than rows

// Activations for the products of a few tokens.
const RowChunk* fill_rows(Work purpose, int type, const QuantizedRows& x, int64_t tokens);
void product_tiles(int type, const Slice& slice, const uint8_t* tiles, int64_t cols);
void product_f32(int type, const Slice& slice, const float* x, int64_t cols);

}  // namespace fomoe::cpu
