#include "layer.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "product.h"

namespace fomoe::cpu {
namespace {

// Cuts the layer's block of working memory into arrays.
class Arrays {
 public:
  Arrays(std::initializer_list<int64_t> counts) {
    int64_t total = 0;
    for (const int64_t n : counts) total += padded(n);
    next_ = work<float>(Work::Layer, total);
  }
  float* take(int64_t count) {
    float* const p = next_;
    next_ += padded(count);
    return p;
  }

 private:
  static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
  float* next_;
};

// A product of a layer's input with one of its matrices; `exact` takes float32 activations.
struct Product {
  const Matrix& w;
  float* out;
  bool exact = false;
};

// The input of a layer's products, quantised once for all of them.
class Input {
 public:
  Input(const float* x, int64_t tokens, int64_t cols, bool int8)
      : x_(x), tokens_(tokens), cols_(cols), int8_(int8 && cols % 32 == 0) {
    if (!int8_) return;
    q_ = work<int8_t>(Work::Quants, tokens * cols);
    scale_ = work<float>(Work::Scales, tokens * cols / 32);
    quantize_rows(x, tokens, cols, q_, scale_);
  }

  // All products; for few tokens side by side, in one division of all their rows among the threads.
  void multiply(std::initializer_list<Product> products) const {
    if (tokens_ > kRowTokens) {
      for (const Product& p : products)
        if (is_float(p))
          matmul_f32(p.w, x_, tokens_, p.out);
        else
          matmul_q8(p.w, q_, scale_, tokens_, p.out);
      return;
    }
    const RowChunk* rows[kMostProducts];
    prepare(products, rows);
    int64_t items = 0, bytes = 0;
    for (const Product& p : products) {
      items += items_of(p);
      bytes += p.w.bytes();
    }
    parallel(items, work_bytes(bytes, tokens_), [&](int64_t item) {
      const Product* p = products.begin();
      for (; item >= items_of(*p); ++p) item -= items_of(*p);
      const int64_t per_item = rows_per_item(p->w.row_bytes(), tokens_);
      const int64_t begin = item * per_item, end = std::min(p->w.rows, begin + per_item);
      const Slice s{p->w.data, p->w.row_bytes(), begin, end, nullptr, tokens_, p->out, p->w.rows};
      if (is_float(*p))
        product_f32(p->w.type, s, x_, cols_);
      else
        kernels().dot_rows[p->w.type](s, rows[p - products.begin()], cols_);
    });
  }

 private:
  static constexpr int kMostProducts = 4;

  bool is_float(const Product& p) const { return !int8_ || p.exact || is_float_type(p.w.type); }
  int64_t items_of(const Product& p) const {
    return ceil_div(p.w.rows, rows_per_item(p.w.row_bytes(), tokens_));
  }

  // The activations in the form that each product's weight type wants, equal ones made once.
  void prepare(std::initializer_list<Product> products, const RowChunk** rows) const {
    constexpr Work purposes[kMostProducts] = {Work::RowChunks, Work::UpRowChunks,
                                              Work::ThirdRowChunks, Work::FourthRowChunks};
    const auto form = [](const Product& p) { return kernels().fill_rows[p.w.type]; };
    for (const Product* p = products.begin(); p != products.end(); ++p) {
      if (is_float(*p)) continue;
      const Product* const twin = std::find_if(products.begin(), p, [&](const Product& earlier) {
        return !is_float(earlier) && form(earlier) == form(*p);
      });
      const auto i = p - products.begin();
      rows[i] = twin != p ? rows[twin - products.begin()]
                          : fill_rows(purposes[i], p->w.type, {q_, scale_, cols_}, tokens_);
    }
  }

  const float* x_;
  int64_t tokens_, cols_;
  bool int8_;
  int8_t* q_ = nullptr;
  float* scale_ = nullptr;
};

// Calls body(first token, number of tokens) for each tile.
template <class Body>
void by_tiles(int64_t tokens, const Body& body) {
  for (int64_t t = 0; t < tokens; t += kLayerTokens) body(t, std::min(kLayerTokens, tokens - t));
}

// [tokens, heads, 2, dim] -> queries and gates [tokens, heads, dim]
void split_heads(const float* both, int64_t count, int64_t dim, float* q, float* gate) {
  const size_t bytes = static_cast<size_t>(dim) * sizeof(float);
  for (int64_t h = 0; h < count; ++h) {
    std::memcpy(q + h * dim, both + 2 * h * dim, bytes);
    std::memcpy(gate + h * dim, both + (2 * h + 1) * dim, bytes);
  }
}

}  // namespace

void DeltaMixer::run(float* x, int64_t tokens, float* conv_state, float* memory) const {
  const int64_t channels = shape.channels(), inner = shape.value_heads * shape.value_dim;
  by_tiles(tokens, [&](int64_t first, int64_t t) {
    float* const residual = x + first * hidden;
    Arrays arrays{t * hidden, t * channels, t * channels, t * inner, t * inner,
                  t * shape.value_heads, t * shape.value_heads};
    float* const h = arrays.take(t * hidden);
    float* const mixed = arrays.take(t * channels);
    float* const convolved = arrays.take(t * channels);
    float* const zs = arrays.take(t * inner);
    float* const recurrent = arrays.take(t * inner);
    float* const alphas = arrays.take(t * shape.value_heads);
    float* const betas = arrays.take(t * shape.value_heads);
    rms_norm(residual, nullptr, norm, t, hidden, numbers.eps, h);
    Input(h, t, hidden, numbers.int8)
        .multiply({{qkv, mixed}, {z, zs}, {alpha, alphas}, {beta, betas}});
    conv_silu(mixed, conv, conv_state, t, channels, conv_width, convolved);
    deltanet({convolved, alphas, betas, decay, dt_bias, shape, t, numbers.eps, memory, recurrent});
    rms_norm(recurrent, zs, out_norm, t * shape.value_heads, shape.value_dim, numbers.eps,
             recurrent);
    Input(recurrent, t, inner, numbers.int8).multiply({{output, h}});
    add(residual, h, t * hidden);
  });
}

void AttentionMixer::run(float* x, int64_t tokens, const Cache& cache, int64_t position0) const {
  const int64_t wide = heads * dim, narrow = kv_heads * dim;
  by_tiles(tokens, [&](int64_t first, int64_t t) {
    float* const residual = x + first * hidden;
    const int64_t start = position0 + first;
    Arrays arrays{t * hidden, 2 * t * wide, t * wide, t * wide, t * wide, t * narrow, t * narrow};
    float* const h = arrays.take(t * hidden);
    float* const both = arrays.take(2 * t * wide);
    float* const queries = arrays.take(t * wide);
    float* const gates = arrays.take(t * wide);
    float* const mixed = arrays.take(t * wide);
    float* const keys = arrays.take(t * narrow);
    float* const values = arrays.take(t * narrow);
    int32_t* const positions = work<int32_t>(Work::Positions, t);
    for (int64_t i = 0; i < t; ++i) positions[i] = static_cast<int32_t>(start + i);
    rms_norm(residual, nullptr, norm, t, hidden, numbers.eps, h);
    Input(h, t, hidden, numbers.int8).multiply({{q, both}, {k, keys}, {v, values}});
    split_heads(both, t * heads, dim, queries, gates);
    rms_norm(queries, nullptr, q_norm, t * heads, dim, numbers.eps, queries);
    rms_norm(keys, nullptr, k_norm, t * kv_heads, dim, numbers.eps, keys);
    rope(queries, positions, t, heads, dim, rope_dims, rope_base);
    rope(keys, positions, t, kv_heads, dim, rope_dims, rope_base);
    kv_store(keys, values, t, cache, start);
    attention(queries, t, heads, cache, start, mixed);
    sigmoid_gate(mixed, gates, t * wide);
    Input(mixed, t, wide, numbers.int8).multiply({{output, h}});
    add(residual, h, t * hidden);
  });
}

void MoeDense::route(const float* x, int64_t tokens, float* h, float* scores) const {
  rms_norm(x, nullptr, norm, tokens, hidden, numbers.eps, h);
  matmul_f32(router, h, tokens, scores);
}

void MoeDense::shared(const float* h, int64_t tokens, float* out) const {
  by_tiles(tokens, [&](int64_t first, int64_t t) {
    const int64_t width = gate.rows;
    Arrays arrays{t * width, t * width, t};
    float* const gates = arrays.take(t * width);
    float* const ups = arrays.take(t * width);
    float* const scales = arrays.take(t);
    float* const rows = out + first * hidden;
    Input(h + first * hidden, t, hidden, numbers.int8)
        .multiply({{gate, gates}, {up, ups}, {scale, scales, true}});
    silu_mul(gates, ups, t * width, gates);
    Input(gates, t, width, numbers.int8).multiply({{down, rows}});
    scale_sigmoid(rows, scales, t, hidden);
  });
}

}  // namespace fomoe::cpu
