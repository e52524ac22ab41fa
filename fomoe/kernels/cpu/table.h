// The kernels of one instruction set as a table of function pointers. Everything here runs on one
// thread over the rows, tokens or heads that the caller (drive.cpp) hands it; nothing allocates.
//
// Numerics: every output is accumulated over its inputs in one fixed order, in float32 with
// explicit fma, whatever the number of tokens or rows in the call. All instruction sets execute the
// same operations on the same numbers, so that their results are equal bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "blocks.h"

namespace fomoe::cpu {

// Activations of tokens for the integer kernels: int8 per 32 values with a float32 scale.
struct QuantizedRows {
  const int8_t* q;     // [T, cols]
  const float* scale;  // [T, cols / 32]
  int64_t cols;

  QuantizedRows from(int64_t token) const {
    return {q + token * cols, scale + token * (cols / 32), cols};
  }
};

// 256 activations of a token as the products of a few tokens want them, zeros past the end of a
// row: a scale per group of the weight type, and the sum of a group's int8, times their scale where
// the type has offsets. In groups of 32 only the first 8 of each count.
struct RowChunk {
  alignas(64) int8_t q[256];
  float scale[16];
  float sums[16];
};
constexpr int64_t row_chunks(int64_t cols) { return (cols + 255) / 256; }

// A slice of a matrix product: rows [begin, end) of the weights against `count` tokens.
// Token j of the slice is row `tokens[j]` of the activations (row j where `tokens` is null) and its
// results go to out[j * out_stride + row].
struct Slice {
  const uint8_t* weights;
  int64_t row_bytes;
  int64_t begin, end;
  const int32_t* tokens;
  int64_t count;
  float* out;
  int64_t out_stride;
};

constexpr int64_t kTokenAlign = 8;  // tiles begin at multiples of it

// Bytes of a token in tiles (panel.h) for weights with groups of `group` values.
constexpr int64_t tiled_bytes(int64_t cols, int group) {
  return (cols + 255) / 256 * (256 / group) * (group + 8);
}

// Working memory of one thread: `bytes` at a 64-byte boundary.
constexpr int64_t scratch_bytes(int64_t cols) { return 24 * ((cols + 255) / 256 * 256) + 65536; }

using DequantizeRow = void (*)(const uint8_t* row, int64_t cols, float* out);
// Rows first .. first + count of x as RowChunks, row_chunks(cols) for each.
using FillRows = void (*)(const QuantizedRows& x, int64_t first, int64_t count, RowChunk* out);
using DotRows = void (*)(const Slice&, const RowChunk* x, int64_t cols);
// Tokens in tiles; the slice's `tokens` are not looked at.
using DotPanels = void (*)(const Slice&, const uint8_t* tiles, int64_t cols, void* scratch);
// `x` float32 [T, cols]
using DotF32 = void (*)(const Slice&, const float* x, int64_t cols, void* scratch);

struct DeltaShape {
  int64_t key_heads, value_heads, key_dim, value_dim;
  int64_t channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
};

// One value head of the delta rule: q, k [tokens, key_dim] and v, out [tokens, value_dim] with
// their strides between tokens, factors decay and beta per token, state [key_dim, value_dim].
struct DeltaHead {
  const float *q, *k, *v, *decay, *beta;
  int64_t qk_stride, v_stride, gate_stride, out_stride;
  int64_t tokens, key_dim, value_dim;
  float *state, *out;
};

constexpr int64_t kConvPiece = 256;
constexpr int64_t kMaxTaps = 8;

// A view of a key or value cache [positions, kv_heads, head_dim] at one kv head.
struct CacheHead {
  const void* data;
  int64_t stride;  // elements between positions
  bool f16;
};

constexpr int64_t kPositions = 256;  // of a block at most, each a partial softmax
constexpr int64_t kScoreStride = kPositions + 16;

// Queries of consecutive tokens [tokens][group, dim] that share a kv head, and a block's positions
// of it: token t sees the first count(t) of them.
struct AttendBlock {
  const float* q;
  int64_t q_stride;  // elements between tokens
  int64_t tokens, group, dim;
  CacheHead k, v;
  int64_t seen;  // by token 0 from the block's beginning on, maybe none or more than the block

  int64_t count(int64_t t) const { return seen + t < kPositions ? seen + t : kPositions; }
};

constexpr int64_t attend_floats(int64_t rows, int64_t dim) {
  return 32 * (dim + 16) + rows * kScoreStride;
}

// A softmax over some positions, per query: the highest score, the sum of exp(score - top) and the
// sum of exp(score - top) * v [rows, dim].
struct SoftmaxPart {
  float *top, *mass, *out;
};

struct Kernels {
  const char* name;
  // All n bytes or-ed together, as fast as they can be read.
  uint64_t (*stream_read)(const uint8_t* p, int64_t n);
  DequantizeRow dequantize[kTypeCount];
  FillRows fill_rows[kTypeCount];
  DotRows dot_rows[kTypeCount];
  DotPanels dot_panels[kTypeCount];
  DotF32 dot_f32[kTypeCount];

  // x [n] -> int8 q [n], scale [n / 32]; n % 32 == 0
  void (*quantize)(const float* x, int64_t n, int8_t* q, float* scale);
  // Tiles of the rows tokens[0 .. count) of x (rows 0 .. count where `tokens` is null), each token
  // tiled_bytes(cols, shape.group) long.
  void (*tile_tokens)(const QuantizedRows& x, const int32_t* tokens, int64_t count,
                      QuantShape shape, uint8_t* out);

  // out = x / sqrt(mean(x^2) + eps) * weight, n values; with z also times silu(z)
  void (*rms_norm)(const float* x, const float* z, const float* weight, int64_t n, float eps,
                   float* out);
  void (*silu_mul)(const float* gate, const float* up, int64_t n, float* out);
  void (*sigmoid_gate)(float* x, const float* gate, int64_t n);
  void (*scale)(float* x, float factor, int64_t n);
  float (*sigmoid)(float x);
  void (*add)(float* a, const float* b, int64_t n);
  void (*add3)(const float* routed, const float* shared, float* residual, int64_t n);
  // out = fma chain from 0 over k rows pairs[order[j]] * weights[j]
  void (*weighted_sum)(const float* pairs, const int32_t* order, const float* weights, int64_t k,
                       int64_t n, float* out);
  // out[i] = fma(x[i], factor, out[i])
  void (*add_scaled)(const float* x, float factor, int64_t n, float* out);
  // rotates the pairs (x[i], x[i + half]) by cosine[i], sine[i]
  void (*rotate)(float* x, const float* cosine, const float* sine, int64_t half);

  void (*to_f16)(const float* x, int64_t n, uint16_t* out);
  // `memory`: attend_floats(tokens * group, dim) floats. Rows of tokens that see nothing are left
  // without a meaning.
  void (*attend)(const AttendBlock& block, float* memory, const SoftmaxPart& out);
  void (*fold)(int64_t rows, int64_t dim, const SoftmaxPart& part, const SoftmaxPart& whole);

  // Channels [begin, end), at most kConvPiece of them, of the causal depthwise convolution of all
  // tokens, then SiLU; width <= kMaxTaps.
  void (*conv_silu)(const float* x, const float* weight, float* state, int64_t tokens,
                    int64_t channels, int64_t width, int64_t begin, int64_t end, float* out);
  // out = x / sqrt(sum(x^2) + eps) * factor
  void (*l2_norm)(const float* x, int64_t n, float eps, float factor, float* out);
  // Columns [begin, end) (multiples of 8) of one value head, all tokens in order; `memory` has
  // room for 32 * key_dim floats.
  void (*delta_head)(const DeltaHead& head, int64_t begin, int64_t end, float* memory);
  // All columns of one value head for its only token.
  void (*delta_token)(const DeltaHead& head);
};

// Null where this build or this machine lacks the instruction set.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512vnni_kernels();

}  // namespace fomoe::cpu
