// Products with weights in GGUF blocks.
#include <algorithm>
#include <atomic>
#include <chrono>

#include "product.h"

namespace fomoe::cpu {

int64_t panel_rows_per_item(int64_t rows, int64_t matrices) {
  const int64_t parts = ceil_div(int64_t{4} * thread_count(), matrices);
  return round_up(std::max(ceil_div(rows, parts), int64_t{2} * kPanelRows), kPanelRows);
}

int64_t float_rows_per_item(int64_t rows, int64_t cols) {
  const int64_t fit = std::max<int64_t>(4, kFloatBytes / (4 * cols) / 4 * 4);
  return std::min(fit, panel_rows_per_item(rows, 1));
}

int64_t tokens_per_block(int64_t cols, int group) {
  constexpr int64_t bytes = 512 * 1024;
  return std::max<int64_t>(32, bytes / tiled_bytes(cols, group) / 16 * 16);
}

const RowChunk* fill_rows(Work purpose, int type, const QuantizedRows& x, int64_t tokens) {
  const int64_t chunks = row_chunks(x.cols);
  RowChunk* const out = work<RowChunk>(purpose, tokens * chunks);
  parallel(tokens, tokens * x.cols * 4,
           [&](int64_t t) { kernels().fill_rows[type](x, t, 1, out + t * chunks); });
  return out;
}

void product_tiles(int type, const Slice& s, const uint8_t* tiles, int64_t cols) {
  kernels().dot_panels[type](s, tiles, cols, work_memory(Work::Row, scratch_bytes(cols)));
}

void product_f32(int type, const Slice& slice, const float* x, int64_t cols) {
  void* const scratch = work_memory(Work::Row, scratch_bytes(cols));
  const int64_t block = std::max<int64_t>(12, kFloatBytes / (4 * cols) / 12 * 12);
  for (int64_t first = 0; first < slice.count; first += block) {
    Slice s = slice;
    s.count = std::min(block, slice.count - first);
    s.out += first * s.out_stride;
    if (s.tokens) s.tokens += first;
    kernels().dot_f32[type](s, slice.tokens ? x : x + first * cols, cols, scratch);
  }
}

uint64_t stream_read(const uint8_t* p, int64_t n) {
  constexpr int64_t piece = 64 * 1024;
  std::atomic<uint64_t> all{0};
  parallel(ceil_div(n, piece), n, [&](int64_t i) {
    all |= kernels().stream_read(p + i * piece, std::min(piece, n - i * piece));
  });
  return all;
}

double call_seconds(int64_t n) {
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < n; ++i) parallel(2, kInlineBytes, [](int64_t) {});
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() /
         static_cast<double>(n);
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

namespace {

void matmul_few(const Matrix& w, const QuantizedRows& x, int64_t tokens, float* out) {
  const RowChunk* const rows = fill_rows(Work::RowChunks, w.type, x, tokens);
  const int64_t per_item = rows_per_item(w.row_bytes(), tokens);
  parallel(ceil_div(w.rows, per_item), work_bytes(w.bytes(), tokens), [&](int64_t i) {
    const int64_t end = std::min(w.rows, (i + 1) * per_item);
    kernels().dot_rows[w.type](
        {w.data, w.row_bytes(), i * per_item, end, nullptr, tokens, out, w.rows}, rows, w.cols);
  });
}

// A block of tokens: into tiles, then past all rows.
void matmul_block(const Matrix& w, const QuantizedRows& x, int64_t tokens, float* out) {
  const QuantShape shape = quant_shape(w.type);
  const int64_t token_bytes = tiled_bytes(w.cols, shape.group);
  uint8_t* const tiles = work<uint8_t>(Work::Tiles, tokens * token_bytes);
  parallel(ceil_div(tokens, kTokenAlign), 2 * tokens * token_bytes, [&](int64_t i) {
    const int64_t first = i * kTokenAlign;
    kernels().tile_tokens(x.from(first), nullptr, std::min(kTokenAlign, tokens - first), shape,
                          tiles + first * token_bytes);
  });
  const int64_t per_item = panel_rows_per_item(w.rows, 1);
  parallel(ceil_div(w.rows, per_item), work_bytes(w.bytes(), tokens), [&](int64_t i) {
    const int64_t end = std::min(w.rows, (i + 1) * per_item);
    product_tiles(w.type, {w.data, w.row_bytes(), i * per_item, end, nullptr, tokens, out, w.rows},
                  tiles, w.cols);
  });
}

}  // namespace

void matmul_q8(const Matrix& w, const int8_t* q, const float* scale, int64_t tokens, float* out) {
  const QuantizedRows x{q, scale, w.cols};
  if (tokens <= kRowTokens) return matmul_few(w, x, tokens, out);
  const int64_t block = tokens_per_block(w.cols, quant_shape(w.type).group);
  for (int64_t first = 0; first < tokens; first += block)
    matmul_block(w, x.from(first), std::min(block, tokens - first), out + first * w.rows);
}

void matmul_f32(const Matrix& w, const float* x, int64_t tokens, float* out) {
  // Each item reads all tokens, and its rows are taken four at a time.
  const int64_t per_item = tokens > kRowTokens ? panel_rows_per_item(w.rows, 1)
                                               : rows_per_item(w.row_bytes(), tokens);
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
