// Routed experts: down . (silu(gate . x) * (up . x)) for many (expert, token) pairs in one call.
//
// Two passes over all experts, with a barrier between them: rows of gate and up, then rows of down.
// The arithmetic is that of matmul, silu_mul and quantize_activations one after the other.
#include "product.h"

namespace fomoe::cpu {
namespace {

constexpr int64_t kHiddenRows = 32;  // rows of gate and up per item: one group of int8 activations

const uint8_t* at(uint64_t address) { return reinterpret_cast<const uint8_t*>(address); }

class ExpertRun {
 public:
  // A part with float weights takes float32 activations whatever the others do.
  ExpertRun(const ExpertCall& call, bool exact)
      : c_(call),
        exact_input_(exact || (is_float_type(call.gate_type) && is_float_type(call.up_type))),
        exact_inner_(exact || is_float_type(call.down_type)),
        exact_(exact) {
    const int64_t pairs = c_.pairs(), n = pairs * c_.width;
    gate_ = work<float>(Work::Gate, n);
    up_ = work<float>(Work::Up, n);
    if (!exact_input_) quantize_input();
    if (exact_inner_) return;
    q_ = work<int8_t>(Work::HiddenQuants, n);
    scale_ = work<float>(Work::HiddenScales, n / 32);
    sums_ = sum_rows(Work::HiddenSums, pairs, c_.width, offset_group(c_.down_type));
  }

  void hidden_layer() {
    const Matrix gate = matrix(c_.gate_type, 0, c_.width, c_.hidden);
    const Matrix up = matrix(c_.up_type, 0, c_.width, c_.hidden);
    const int64_t items = ceil_div(c_.width, kHiddenRows);
    parallel(c_.count * items, work_of(gate.bytes() + up.bytes()), [&](int64_t item) {
      const int64_t begin = item % items * kHiddenRows;
      hidden_rows(item / items, begin, std::min(c_.width, begin + kHiddenRows));
    });
  }

  void output_layer() {
    const Matrix down = matrix(c_.down_type, 0, c_.hidden, c_.width);
    const int64_t rows = rows_per_item(down.row_bytes(), c_.pairs() / c_.count);
    const int64_t items = ceil_div(c_.hidden, rows);
    parallel(c_.count * items, work_of(down.bytes()), [&](int64_t item) {
      const int64_t begin = item % items * rows;
      output_rows(item / items, begin, std::min(c_.hidden, begin + rows));
    });
  }

 private:
  static Matrix matrix(int type, uint64_t address, int64_t rows, int64_t cols) {
    return {type, at(address), rows, cols};
  }
  int64_t work_of(int64_t expert_bytes) const {
    return work_bytes(c_.count * expert_bytes, c_.pairs() / c_.count);
  }
  int64_t first_pair(int64_t i) const { return c_.pair_start[i]; }
  int64_t pairs_of(int64_t i) const { return c_.pair_start[i + 1] - c_.pair_start[i]; }

  void quantize_input() {
    int8_t* const q = work<int8_t>(Work::Quants, c_.tokens * c_.hidden);
    float* const scale = work<float>(Work::Scales, c_.tokens * c_.hidden / 32);
    quantize_rows(c_.x, c_.tokens, c_.hidden, q, scale);
    const int gate = offset_group(c_.gate_type), up = offset_group(c_.up_type);
    const auto sums = [&](Work purpose, int group) {
      const bool wanted = gate == group || up == group;
      return with_sums(q, scale, c_.tokens, c_.hidden,
                       sum_rows(purpose, c_.tokens, c_.hidden, wanted ? group : 0));
    };
    coarse_ = sums(Work::Sums, 32);
    fine_ = sums(Work::FineSums, 16);
  }

  void product(const Matrix& w, const Slice& s) const {
    if (exact_ || is_float_type(w.type))
      product_f32(w.type, s, c_.x, c_.hidden);
    else
      product_q8(w.type, s, offset_group(w.type) == 16 ? fine_ : coarse_);
  }

  // Rows [begin, end) of gate and up for the pairs of expert i, joined, and quantised group by
  // group.
  void hidden_rows(int64_t i, int64_t begin, int64_t end) const {
    const int64_t p0 = first_pair(i), n = pairs_of(i), count = end - begin;
    const Matrix gate = matrix(c_.gate_type, c_.gate[i], c_.width, c_.hidden);
    const Matrix up = matrix(c_.up_type, c_.up[i], c_.width, c_.hidden);
    Slice s{gate.data, gate.row_bytes(),      begin,   end, c_.pair_token + p0,
            n,         gate_ + p0 * c_.width, c_.width};
    product(gate, s);
    s.weights = up.data;
    s.row_bytes = up.row_bytes();
    s.out = up_ + p0 * c_.width;
    product(up, s);
    for (int64_t p = p0; p < p0 + n; ++p) {
      const int64_t o = p * c_.width + begin;
      kernels().silu_mul(gate_ + o, up_ + o, count, gate_ + o);
      if (exact_inner_) continue;
      kernels().quantize(gate_ + o, count, q_ + o, scale_ + o / 32);
      if (sums_.group)
        kernels().group_sums(q_ + o, scale_ + o / 32, count, sums_.group,
                             sums_.data + p * sums_.stride + begin / sums_.group);
    }
  }

  void output_rows(int64_t i, int64_t begin, int64_t end) const {
    const Matrix down = matrix(c_.down_type, c_.down[i], c_.hidden, c_.width);
    const int64_t p0 = first_pair(i);
    const Slice s{down.data,   down.row_bytes(),        begin,    end, nullptr,
                  pairs_of(i), c_.out + p0 * c_.hidden, c_.hidden};
    const QuantizedRows inner{q_, scale_, sums_.data, c_.width, c_.width / 32, sums_.stride};
    if (exact_inner_)
      product_f32(down.type, s, gate_ + p0 * c_.width, c_.width);
    else
      product_q8(down.type, s, inner.from(p0));
  }

  const ExpertCall& c_;
  const bool exact_input_, exact_inner_, exact_;
  float *gate_, *up_;                // [pairs, F]; gate_ then holds silu(gate) * up
  QuantizedRows coarse_{}, fine_{};  // the input with sums per 32 and per 16 values
  int8_t* q_ = nullptr;              // [pairs, F], the hidden layer in int8
  float* scale_ = nullptr;
  SumRows sums_{};
};

}  // namespace

void experts(const ExpertCall& call, bool exact_activations) {
  if (call.count == 0 || call.pairs() == 0) return;
  ExpertRun run(call, exact_activations);
  run.hidden_layer();
  run.output_layer();
}

}  // namespace fomoe::cpu
