// Products with weights in GGUF blocks.
#include <algorithm>

#include "product.h"

namespace fomoe::cpu {
namespace {

constexpr int64_t kTokenTile = 32;  // tokens per pass: their int8 rows stay in L2

int64_t sums_stride(int64_t cols, int group) { return ceil_div(cols, 256) * (256 / group); }

}  // namespace

int offset_group(int type) {
  switch (static_cast<QType>(type)) {
    case QType::Q2_K:
      return 16;
    case QType::Q4_1:
    case QType::Q5_1:
    case QType::Q4_K:
    case QType::Q5_K:
      return 32;
    default:
      return 0;
  }
}

SumRows sum_rows(Work purpose, int64_t tokens, int64_t cols, int group) {
  if (!group) return {nullptr, 0, 0};
  const int64_t stride = sums_stride(cols, group);
  float* const data = work<float>(purpose, tokens * stride);
  const int64_t used = cols / group;
  for (int64_t t = 0; t < tokens; ++t)
    std::fill(data + t * stride + used, data + (t + 1) * stride, 0.0f);
  return {data, stride, group};
}

QuantizedRows with_sums(const int8_t* q, const float* scale, int64_t tokens, int64_t cols,
                        const SumRows& sums) {
  if (sums.group)
    parallel(tokens, tokens * cols, [=](int64_t t) {
      kernels().group_sums(q + t * cols, scale + t * cols / 32, cols, sums.group,
                           sums.data + t * sums.stride);
    });
  return {q, scale, sums.data, cols, cols / 32, sums.stride};
}

void product_q8(int type, const Slice& slice, const QuantizedRows& x) {
  void* const scratch = work_memory(Work::Row, scratch_bytes(x.cols));
  Slice s = slice;
  QuantizedRows part = x;
  for (int64_t j = 0; j < slice.count; j += kTokenTile) {
    s.count = std::min(kTokenTile, slice.count - j);
    s.out = slice.out + j * s.out_stride;
    if (slice.tokens)
      s.tokens = slice.tokens + j;
    else
      part = x.from(j);
    kernels().dot_q8[type](s, part, scratch);
  }
}

void product_f32(int type, const Slice& s, const float* x, int64_t cols) {
  kernels().dot_f32[type](s, x, cols, work_memory(Work::Row, scratch_bytes(cols)));
}

void dequantize_rows(const Matrix& w, float* out) {
  const auto row = kernels().dequantize[w.type];
  parallel(w.rows, w.rows * w.cols,
           [&](int64_t r) { row(w.data + r * w.row_bytes(), w.cols, out + r * w.cols); });
}

void embed(const Matrix& w, const int32_t* ids, int64_t tokens, float* out) {
  const auto row = kernels().dequantize[w.type];
  for (int64_t t = 0; t < tokens; ++t)
    row(w.data + ids[t] * w.row_bytes(), w.cols, out + t * w.cols);
}

void quantize_rows(const float* x, int64_t tokens, int64_t cols, int8_t* q, float* scale) {
  parallel(tokens, tokens * cols * 4, [=](int64_t t) {
    kernels().quantize(x + t * cols, cols, q + t * cols, scale + t * cols / 32);
  });
}

void matmul_q8(const Matrix& w, const int8_t* q, const float* scale, int64_t tokens, float* out) {
  const SumRows sums = sum_rows(Work::Sums, tokens, w.cols, offset_group(w.type));
  const QuantizedRows x = with_sums(q, scale, tokens, w.cols, sums);
  const int64_t per_item = rows_per_item(w.row_bytes(), tokens);
  parallel(ceil_div(w.rows, per_item), work_bytes(w.bytes(), tokens), [&](int64_t i) {
    const int64_t end = std::min(w.rows, (i + 1) * per_item);
    product_q8(w.type, {w.data, w.row_bytes(), i * per_item, end, nullptr, tokens, out, w.rows}, x);
  });
}

void matmul_f32(const Matrix& w, const float* x, int64_t tokens, float* out) {
  const int64_t per_item = rows_per_item(w.row_bytes(), tokens);
  parallel(ceil_div(w.rows, per_item), work_bytes(w.bytes(), tokens), [&](int64_t i) {
    const int64_t end = std::min(w.rows, (i + 1) * per_item);
    product_f32(w.type, {w.data, w.row_bytes(), i * per_item, end, nullptr, tokens, out, w.rows}, x,
                w.cols);
  });
}

void reduce_pairs(const float* pairs, const int32_t* order, const float* weights, int64_t tokens,
                  int64_t k, int64_t cols, float* out) {
  parallel(tokens, tokens * k * cols * 4, [=](int64_t t) {
    kernels().weighted_sum(pairs, order + t * k, weights + t * k, k, cols, out + t * cols);
  });
}

}  // namespace fomoe::cpu
