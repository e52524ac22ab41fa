// Routed experts: down . (silu(gate . x) * (up . x)) for many (expert, token) pairs in one call.
//
// Passes over all experts with a barrier after each: rows of gate and up, which leave the hidden
// activations of all pairs in int8; those of experts with many pairs into tiles; rows of down. The
// arithmetic is that of matmul, silu_mul and quantize_activations one after the other.
#include "product.h"

namespace fomoe::cpu {
namespace {

constexpr int64_t kHiddenRows = 32;  // rows come in groups of int8 activations

const uint8_t* at(uint64_t address) { return reinterpret_cast<const uint8_t*>(address); }

// Rows [begin, end) of an expert's matrix.
struct Part {
  Matrix w;
  int64_t begin, end;
};

// Some of the tokens, ready for a product: int8 rows, tiles, or float32 where both are null.
struct Ready {
  const int32_t* tokens;  // rows of the activations; null: 0 .. count
  int64_t count;
  const RowChunk* rows;
  const uint8_t* tiles;
};

// out[j * stride + r - part.begin] = row r of the part times token j
void product(const Part& part, const Ready& in, const float* x, float* out, int64_t stride) {
  const Matrix& w = part.w;
  const Slice s{w.data,    w.row_bytes(), part.begin,       part.end,
                in.tokens, in.count,      out - part.begin, stride};
  if (in.rows) return kernels().dot_rows[w.type](s, in.rows, w.cols);
  if (in.tiles) return product_tiles(w.type, s, in.tiles, w.cols);
  product_f32(w.type, s, x, w.cols);
}

class ExpertRun {
 public:
  // A part with float weights takes float32 activations whatever the others do.
  ExpertRun(const ExpertCall& call, bool exact)
      : c_(call),
        pairs_(call.pairs()),
        exact_(exact),
        float_inner_(exact || is_float_type(call.down_type)) {
    if (!takes_floats(c_.gate_type) || !takes_floats(c_.up_type)) quantize_input();
    if (float_inner_) {
      hidden_ = work<float>(Work::Hidden, pairs_ * c_.width);
      return;
    }
    q_ = work<int8_t>(Work::HiddenQuants, pairs_ * c_.width);
    scale_ = work<float>(Work::HiddenScales, pairs_ * c_.width / 32);
  }

  void hidden_layer() {
    const Matrix gate = matrix(c_.gate_type, 0, c_.width, c_.hidden);
    const Matrix up = matrix(c_.up_type, 0, c_.width, c_.hidden);
    const int64_t rows = many()
                             ? panel_rows_per_item(c_.width, c_.count) / kHiddenRows * kHiddenRows
                             : 2 * kHiddenRows;
    const int64_t items = ceil_div(c_.width, rows);
    parallel(c_.count * items, work_of(gate.bytes() + up.bytes()), [&](int64_t item) {
      const int64_t begin = item % items * rows;
      hidden_rows(item / items, begin, std::min(c_.width, begin + rows));
    });
    if (!float_inner_) prepare_hidden();
  }

  // Every pair's row into call.out.
  void output_layer() const {
    const Matrix down = matrix(c_.down_type, 0, c_.hidden, c_.width);
    const int64_t rows = many() ? panel_rows_per_item(c_.hidden, c_.count)
                                : rows_per_item(down.row_bytes(), pairs_ / c_.count);
    const int64_t items = ceil_div(c_.hidden, rows);
    parallel(c_.count * items, work_of(down.bytes()), [&](int64_t item) {
      const int64_t i = item / items, begin = item % items * rows;
      const int64_t end = std::min(c_.hidden, begin + rows);
      by_blocks(i, c_.width, c_.down_type, [&](int64_t first, int64_t count) {
        output_rows(i, begin, end, first, count, c_.out + first * c_.hidden + begin, c_.hidden);
      });
    });
  }

  // out[t] = fma(weight, row, out[t]) over the token's pairs, experts in the order of the call.
  void output_sums(const float* weights) const {
    const Matrix down = matrix(c_.down_type, 0, c_.hidden, c_.width);
    const int64_t rows = panel_rows_per_item(c_.hidden, 1);
    parallel(ceil_div(c_.hidden, rows), work_of(down.bytes()), [&](int64_t item) {
      const int64_t begin = item * rows, end = std::min(c_.hidden, begin + rows);
      for (int64_t i = 0; i < c_.count; ++i)
        by_blocks(i, c_.width, c_.down_type, [&](int64_t first, int64_t count) {
          float* const y = work<float>(Work::Gate, count * rows);
          output_rows(i, begin, end, first, count, y, end - begin);
          for (int64_t j = 0; j < count; ++j)
            kernels().add_scaled(y + j * (end - begin), weights[first + j], end - begin,
                                 c_.out + c_.pair_token[first + j] * c_.hidden + begin);
        });
    });
  }

 private:
  static Matrix matrix(int type, uint64_t address, int64_t rows, int64_t cols) {
    return {type, at(address), rows, cols};
  }
  bool takes_floats(int type) const { return exact_ || is_float_type(type); }
  bool many() const { return pairs_ > c_.count * kRowTokens; }
  int64_t work_of(int64_t expert_bytes) const {
    return work_bytes(c_.count * expert_bytes, pairs_ / c_.count);
  }
  int64_t pairs_of(int64_t i) const { return c_.pair_start[i + 1] - c_.pair_start[i]; }

  // Calls body(first pair, count) for the pairs of expert i, so many at a time as fit L2.
  template <class Body>
  void by_blocks(int64_t i, int64_t cols, int type, const Body& body) const {
    const int64_t block =
        takes_floats(type) ? 128 : tokens_per_block(cols, quant_shape(type).group);
    for (int64_t p = c_.pair_start[i]; p < c_.pair_start[i + 1]; p += block)
      body(p, std::min(block, c_.pair_start[i + 1] - p));
  }

  void quantize_input() {
    int8_t* const q = work<int8_t>(Work::Quants, c_.tokens * c_.hidden);
    float* const scale = work<float>(Work::Scales, c_.tokens * c_.hidden / 32);
    quantize_rows(c_.x, c_.tokens, c_.hidden, q, scale);
    input_ = {q, scale, c_.hidden};
    if (!takes_floats(c_.gate_type))
      gate_rows_ = fill_rows(Work::RowChunks, c_.gate_type, input_, c_.tokens);
    up_rows_ = gate_rows_;
    if (!takes_floats(c_.up_type) && c_.up_type != c_.gate_type)
      up_rows_ = fill_rows(Work::UpRowChunks, c_.up_type, input_, c_.tokens);
  }

  // Tokens of expert i ready for gate or up.
  Ready ready(int64_t i, int type, const RowChunk* rows, int64_t first, int64_t count) const {
    const int32_t* const tokens = c_.pair_token + first;
    if (takes_floats(type)) return {tokens, count, nullptr, nullptr};
    if (pairs_of(i) <= kRowTokens) return {tokens, count, rows, nullptr};
    const QuantShape shape = quant_shape(type);
    auto* const tiles = work<uint8_t>(Work::Tiles, count * tiled_bytes(c_.hidden, shape.group));
    kernels().tile_tokens(input_, tokens, count, shape, tiles);
    return {nullptr, count, nullptr, tiles};
  }

  // Rows [begin, end) of gate and up for the pairs of expert i, joined and quantised.
  void hidden_rows(int64_t i, int64_t begin, int64_t end) const {
    const Part gate{matrix(c_.gate_type, c_.gate[i], c_.width, c_.hidden), begin, end};
    const Part up{matrix(c_.up_type, c_.up[i], c_.width, c_.hidden), begin, end};
    const int64_t rows = end - begin;
    by_blocks(i, c_.hidden, c_.gate_type, [&](int64_t first, int64_t count) {
      float* const g = work<float>(Work::Gate, count * rows);
      float* const u = work<float>(Work::Up, count * rows);
      Ready in = ready(i, c_.gate_type, gate_rows_, first, count);
      product(gate, in, c_.x, g, rows);
      if (c_.up_type != c_.gate_type) in = ready(i, c_.up_type, up_rows_, first, count);
      product(up, in, c_.x, u, rows);
      for (int64_t j = 0; j < count; ++j) join(g + j * rows, u + j * rows, first + j, begin, rows);
    });
  }

  void join(float* gate, const float* up, int64_t pair, int64_t begin, int64_t rows) const {
    const int64_t o = pair * c_.width + begin;
    kernels().silu_mul(gate, up, rows, float_inner_ ? hidden_ + o : gate);
    if (float_inner_) return;
    kernels().quantize(gate, rows, q_ + o, scale_ + o / 32);
  }

  // The int8 hidden layer, ready for down: few pairs of an expert as rows, many as tiles.
  void prepare_hidden() {
    const QuantShape shape = quant_shape(c_.down_type);
    const int64_t bytes = tiled_bytes(c_.width, shape.group), chunks = row_chunks(c_.width);
    const QuantizedRows hidden{q_, scale_, c_.width};
    tiles_ = work<uint8_t>(Work::HiddenTiles, pairs_ * bytes);
    rows_ = work<RowChunk>(Work::HiddenRows, pairs_ * chunks);
    parallel(c_.count, pairs_ * c_.width * 4, [&](int64_t i) {
      const int64_t first = c_.pair_start[i], count = pairs_of(i);
      if (count <= kRowTokens)
        kernels().fill_rows[c_.down_type](hidden, first, count, rows_ + first * chunks);
      else
        kernels().tile_tokens(hidden.from(first), nullptr, count, shape, tiles_ + first * bytes);
    });
  }

  // Rows [begin, end) of down for `count` pairs of expert i: to y[j * stride], j from 0.
  void output_rows(int64_t i, int64_t begin, int64_t end, int64_t first, int64_t count, float* y,
                   int64_t stride) const {
    const Part down{matrix(c_.down_type, c_.down[i], c_.hidden, c_.width), begin, end};
    Ready in{nullptr, count, nullptr, nullptr};
    if (!float_inner_ && pairs_of(i) <= kRowTokens) in.rows = rows_ + first * row_chunks(c_.width);
    if (!float_inner_ && pairs_of(i) > kRowTokens)
      in.tiles = tiles_ + first * tiled_bytes(c_.width, quant_shape(c_.down_type).group);
    product(down, in, float_inner_ ? hidden_ + first * c_.width : nullptr, y, stride);
  }

  const ExpertCall& c_;
  const int64_t pairs_;
  const bool exact_, float_inner_;
  QuantizedRows input_{};
  const RowChunk *gate_rows_ = nullptr, *up_rows_ = nullptr;
  float* hidden_ = nullptr;  // the hidden layer [pairs, F] in float32
  int8_t* q_ = nullptr;      // or in int8
  float* scale_ = nullptr;
  RowChunk* rows_ = nullptr;  // and that ready for down
  uint8_t* tiles_ = nullptr;
};

}  // namespace

void experts(const ExpertCall& call, bool exact_activations) {
  if (call.count == 0 || call.pairs() == 0) return;
  ExpertRun run(call, exact_activations);
  run.hidden_layer();
  run.output_layer();
}

void experts_sum(const ExpertCall& call, const float* weights, bool exact_activations) {
  if (call.count == 0 || call.pairs() == 0) return;
  ExpertRun run(call, exact_activations);
  run.hidden_layer();
  run.output_sums(weights);
}

}  // namespace fomoe::cpu
