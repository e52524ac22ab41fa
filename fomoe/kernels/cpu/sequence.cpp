// Norms, rotary embedding, convolution and the delta rule over whole arrays.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "drive.h"

namespace fomoe::cpu {
namespace {

// Element-wise kernels read and write some 12 bytes per value; pieces of 16 KB of values.
constexpr int64_t kPiece = 4096;

template <class Body>
void by_pieces(int64_t n, const Body& body) {
  parallel((n + kPiece - 1) / kPiece, n * 4,
           [&](int64_t i) { body(i * kPiece, std::min(kPiece, n - i * kPiece)); });
}

}  // namespace

void silu_mul(const float* gate, const float* up, int64_t n, float* out) {
  by_pieces(n, [=](int64_t i, int64_t m) { kernels().silu_mul(gate + i, up + i, m, out + i); });
}

void sigmoid_gate(float* x, const float* gate, int64_t n) {
  by_pieces(n, [=](int64_t i, int64_t m) { kernels().sigmoid_gate(x + i, gate + i, m); });
}

void add(float* a, const float* b, int64_t n) {
  by_pieces(n, [=](int64_t i, int64_t m) { kernels().add(a + i, b + i, m); });
}

void add3(const float* routed, const float* shared, float* residual, int64_t n) {
  by_pieces(n,
            [=](int64_t i, int64_t m) { kernels().add3(routed + i, shared + i, residual + i, m); });
}

void scale_sigmoid(float* x, const float* gate, int64_t rows, int64_t cols) {
  parallel(rows, rows * cols * 4,
           [=](int64_t r) { kernels().scale(x + r * cols, kernels().sigmoid(gate[r]), cols); });
}

void rms_norm(const float* x, const float* z, const float* weight, int64_t rows, int64_t cols,
              float eps, float* out) {
  parallel(rows, rows * cols * 4, [=](int64_t r) {
    kernels().rms_norm(x + r * cols, z ? z + r * cols : nullptr, weight, cols, eps, out + r * cols);
  });
}

void rope(float* x, const int32_t* positions, int64_t tokens, int64_t heads, int64_t dim,
          int64_t n_rot, double base) {
  const int64_t half = n_rot / 2;
  float* const table = work<float>(Work::Rotation, tokens * n_rot);  // cosines, sines per token
  for (int64_t i = 0; i < half; ++i) {
    const double frequency =
        std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(n_rot));
    for (int64_t t = 0; t < tokens; ++t) {
      const double angle = positions[t] * frequency;
      table[t * n_rot + i] = static_cast<float>(std::cos(angle));
      table[t * n_rot + half + i] = static_cast<float>(std::sin(angle));
    }
  }
  parallel(tokens, tokens * heads * n_rot * 4, [=](int64_t t) {
    const float* const cosine = table + t * n_rot;
    for (int64_t h = 0; h < heads; ++h)
      kernels().rotate(x + (t * heads + h) * dim, cosine, cosine + half, half);
  });
}

void kv_store(const float* k, const float* v, int64_t tokens, const Cache& cache,
              int64_t position0) {
  const int64_t row = cache.heads * cache.dim, start = position0 * row;
  const auto put = [&](const float* from, void* to, int64_t t) {
    if (cache.f16)
      kernels().to_f16(from + t * row, row, static_cast<uint16_t*>(to) + start + t * row);
    else
      std::memcpy(static_cast<float*>(to) + start + t * row, from + t * row,
                  4 * static_cast<size_t>(row));
  };
  parallel(tokens, tokens * row * 8, [&](int64_t t) {
    put(k, cache.k, t);
    put(v, cache.v, t);
  });
}

void conv_silu(const float* x, const float* weight, float* state, int64_t tokens, int64_t channels,
               int64_t width, float* out) {
  constexpr int64_t piece = kConvPiece;
  parallel((channels + piece - 1) / piece, tokens * channels * 8, [=](int64_t i) {
    kernels().conv_silu(x, weight, state, tokens, channels, width, i * piece,
                        std::min(channels, (i + 1) * piece), out);
  });
}

namespace {

// Keys and queries of all tokens, normalised: [tokens, 2, key_heads, key_dim], queries first and
// already divided by sqrt(key_dim); then decay and beta [tokens, value_heads] each.
struct DeltaInputs {
  float *qk, *decay, *beta;
};

DeltaInputs delta_inputs(const DeltaCall& c) {
  const DeltaShape& s = c.shape;
  const int64_t heads = 2 * s.key_heads, row = heads * s.key_dim;
  float* const memory = work<float>(Work::Keys, c.tokens * (row + 2 * s.value_heads));
  const DeltaInputs in{memory, memory + c.tokens * row, memory + c.tokens * (row + s.value_heads)};
  const float shrink = 1.0f / std::sqrt(static_cast<float>(s.key_dim));
  parallel(c.tokens, c.tokens * row * 4, [&](int64_t t) {
    for (int64_t h = 0; h < heads; ++h)
      kernels().l2_norm(c.qkv + t * s.channels() + h * s.key_dim, s.key_dim, c.eps,
                        h < s.key_heads ? shrink : 1.0f, in.qk + t * row + h * s.key_dim);
    for (int64_t r = 0; r < s.value_heads; ++r) {
      const int64_t i = t * s.value_heads + r;
      const double a = static_cast<double>(c.alpha[i]) + c.dt_bias[r];
      const double softplus = a > 30.0 ? a : std::log1p(std::exp(a));
      in.decay[i] = static_cast<float>(std::exp(c.ssm_a[r] * softplus));
      in.beta[i] = static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(c.beta[i]))));
    }
  });
  return in;
}

}  // namespace

void deltanet(const DeltaCall& c) {
  const DeltaShape& s = c.shape;
  const DeltaInputs in = delta_inputs(c);
  constexpr int64_t piece = 32;  // columns of the state per item, whose rows then fit into L1
  const int64_t pieces = c.tokens == 1 ? 1 : (s.value_dim + piece - 1) / piece;
  const int64_t qk_stride = 2 * s.key_heads * s.key_dim, values = s.value_heads * s.value_dim;
  parallel(s.value_heads * pieces, c.tokens * values * s.key_dim * 4, [&](int64_t item) {
    const int64_t r = item / pieces, begin = item % pieces * piece;
    const float* const q = in.qk + r % s.key_heads * s.key_dim;
    const DeltaHead head{q,
                         q + s.key_heads * s.key_dim,
                         c.qkv + qk_stride + r * s.value_dim,
                         in.decay + r,
                         in.beta + r,
                         qk_stride,
                         s.channels(),
                         s.value_heads,
                         values,
                         c.tokens,
                         s.key_dim,
                         s.value_dim,
                         c.state + r * s.key_dim * s.value_dim,
                         c.out + r * s.value_dim};
    if (c.tokens == 1)
      kernels().delta_token(head);
    else
      kernels().delta_head(head, begin, std::min(s.value_dim, begin + piece),
                           work<float>(Work::Tile, piece * s.key_dim));
  });
}

}  // namespace fomoe::cpu
