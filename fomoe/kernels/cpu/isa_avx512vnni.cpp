// AVX2's kernels with the VNNI byte product and 32 vector registers (Intel from Ice Lake, AMD from
// Zen 4 on); vectors stay 256 bits wide, so the bits are those of AVX2.
#include "table.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__F16C__)
#define FOMOE_ISA avx512vnni
#include "kernels.inl.h"

namespace fomoe::cpu {

const Kernels* avx512vnni_kernels() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vnni") ||
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("fma"))
    return nullptr;
  static const Kernels table = avx512vnni::make_table("avx512vnni");
  return &table;
}

}  // namespace fomoe::cpu
#else
namespace fomoe::cpu {
const Kernels* avx512vnni_kernels() { return nullptr; }
}  // namespace fomoe::cpu
#endif
