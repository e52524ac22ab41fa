// Kernels for x86-64 with AVX-512 BW, VL, VNNI, VBMI and GFNI (Intel from Ice Lake, AMD from Zen 4
// on).
#include "table.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__GFNI__) && defined(__F16C__)
#define FOMOE_ISA avx512vnni
#include "kernels.inl.h"

namespace fomoe::cpu {

const Kernels* avx512vnni_kernels() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vnni") ||
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vbmi") ||
      !__builtin_cpu_supports("gfni") || !__builtin_cpu_supports("fma"))
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
