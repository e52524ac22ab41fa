// The body of each isa_*.cpp: one table of kernels in the namespace FOMOE_ISA.
#include "attend.h"
#include "dot_float.h"
#include "dot_rows.h"
#include "panel.h"
#include "sequence_ops.h"

namespace fomoe::cpu::FOMOE_ISA {

// What a processor reads per second is what its kernels are compared with, so nothing is done with
// the bytes but to add them up; four sums, for one would wait for itself.
inline uint64_t stream_read(const uint8_t* p, int64_t n) {
  B64 sum[4] = {splat_64(0), splat_64(0), splat_64(0), splat_64(0)};
  int64_t i = 0;
  for (; i + 256 <= n; i += 256)
    for (int k = 0; k < 4; ++k) sum[k] = or_(sum[k], load_64(p + i + 64 * k));
  alignas(64) uint8_t all[64];
  store_64(all, or_(or_(sum[0], sum[1]), or_(sum[2], sum[3])));
  uint64_t total = 0;
  for (const uint8_t byte : all) total |= byte;
  for (; i < n; ++i) total |= p[i];
  return total;
}

template <class T>
void enter(Kernels& k, QType type) {
  const int n = static_cast<int>(type);
  k.dequantize[n] = dequantize<BlockRow<T>>;
  k.fill_rows[n] = fill_rows<T>;
  k.dot_rows[n] = dot_rows<T>;
  k.dot_panels[n] = dot_panels<T>;
  k.dot_f32[n] = dot_f32<BlockRow<T>>;
}

template <class T>
void enter_float(Kernels& k, QType type) {
  const int n = static_cast<int>(type);
  k.dequantize[n] = dequantize<FloatRow<T>>;
  k.dot_f32[n] = dot_f32<FloatRow<T>>;
}

inline Kernels make_table(const char* name) {
  Kernels k{};
  k.name = name;
  enter_float<F32>(k, QType::F32);
  enter_float<F16>(k, QType::F16);
  enter_float<BF16>(k, QType::BF16);
  enter<Q8_0>(k, QType::Q8_0);
  enter<Q4_0>(k, QType::Q4_0);
  enter<Q4_1>(k, QType::Q4_1);
  enter<Q5_0>(k, QType::Q5_0);
  enter<Q5_1>(k, QType::Q5_1);
  enter<Q2_K>(k, QType::Q2_K);
  enter<Q3_K>(k, QType::Q3_K);
  enter<Q4_K>(k, QType::Q4_K);
  enter<Q5_K>(k, QType::Q5_K);
  enter<Q6_K>(k, QType::Q6_K);
  enter<IQ4_NL>(k, QType::IQ4_NL);
  enter<IQ4_XS>(k, QType::IQ4_XS);
  k.stream_read = stream_read;
  k.quantize = quantize;
  k.tile_tokens = tile_tokens;
  k.rms_norm = rms_norm;
  k.silu_mul = silu_mul;
  k.sigmoid_gate = sigmoid_gate;
  k.scale = scale;
  k.sigmoid = sigmoid_one;
  k.add = add_to;
  k.add3 = add3;
  k.weighted_sum = weighted_sum;
  k.add_scaled = add_scaled;
  k.rotate = rotate;
  k.to_f16 = to_f16;
  k.attend = attend;
  k.fold = fold;
  k.conv_silu = conv_silu;
  k.l2_norm = l2_norm;
  k.delta_head = delta_head;
  k.delta_token = delta_token;
  return k;
}

}  // namespace fomoe::cpu::FOMOE_ISA
