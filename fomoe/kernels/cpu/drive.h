// The operations over whole arrays: they cut the work into items, one owner per output, and run the
// kernels of the instruction set in use. Shapes are checked by the caller (module.cpp).
#pragma once

#include "pool.h"
#include "table.h"

namespace fomoe::cpu {

struct Matrix {
  int type;
  const uint8_t* data;
  int64_t rows, cols;
  int64_t row_bytes() const {
    const TypeShape s = type_shape(type);
    return cols / s.elements * s.bytes;
  }
  int64_t bytes() const { return rows * row_bytes(); }
};

// Reads n bytes with all threads and returns them or-ed together.
uint64_t stream_read(const uint8_t* p, int64_t n);
// Mean seconds of n calls of the threads with two empty items each.
double call_seconds(int64_t n);
void dequantize_rows(const Matrix& w, float* out);
void embed(const Matrix& w, const int32_t* ids, int64_t tokens, float* out);
void quantize_rows(const float* x, int64_t tokens, int64_t cols, int8_t* q, float* scale);
void matmul_q8(const Matrix& w, const int8_t* q, const float* scale, int64_t tokens, float* out);
void matmul_f32(const Matrix& w, const float* x, int64_t tokens, float* out);

// Experts i < count at the addresses gate[i], up[i], down[i]; pairs [pair_start[i], pair_start[i +
// 1]) of them, pair p belongs to token pair_token[p].
struct ExpertCall {
  const uint64_t *gate, *up, *down;
  int gate_type, up_type, down_type;
  int64_t count, hidden, width;  // hidden: D, width: F
  const float* x;                // [tokens, D]
  int64_t tokens;
  const int32_t *pair_start, *pair_token;
  float* out;  // [pairs, D]; of experts_sum [tokens, D]
  int64_t pairs() const { return pair_start[count]; }
};
void experts(const ExpertCall& call, bool exact_activations);
// out[t] = fma(weights[p], row of pair p, out[t]) over the pairs p of token t in ascending order.
void experts_sum(const ExpertCall& call, const float* weights, bool exact_activations);
void reduce_pairs(const float* pairs, const int32_t* order, const float* weights, int64_t tokens,
                  int64_t k, int64_t cols, float* out);

void rms_norm(const float* x, const float* z, const float* weight, int64_t rows, int64_t cols,
              float eps, float* out);
void rope(float* x, const int32_t* positions, int64_t tokens, int64_t heads, int64_t dim,
          int64_t n_rot, double base);

struct Cache {
  void *k, *v;
  int64_t positions, heads, dim;
  bool f16;
};
void kv_store(const float* k, const float* v, int64_t tokens, const Cache& cache,
              int64_t position0);
void attention(const float* q, int64_t tokens, int64_t heads, const Cache& cache, int64_t position0,
               float* out);

void conv_silu(const float* x, const float* weight, float* state, int64_t tokens, int64_t channels,
               int64_t width, float* out);
struct DeltaCall {
  const float *qkv, *alpha, *beta, *ssm_a, *dt_bias;
  DeltaShape shape;
  int64_t tokens;
  float eps;
  float *state, *out;
};
void deltanet(const DeltaCall& call);

// Element-wise over n values (`rows` times `cols` for scale_sigmoid).
void silu_mul(const float* gate, const float* up, int64_t n, float* out);
void sigmoid_gate(float* x, const float* gate, int64_t n);
void add(float* a, const float* b, int64_t n);
void add3(const float* routed, const float* shared, float* residual, int64_t n);
void scale_sigmoid(float* x, const float* gate, int64_t rows, int64_t cols);

}  // namespace fomoe::cpu
