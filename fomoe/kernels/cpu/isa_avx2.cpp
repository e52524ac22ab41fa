// Kernels for x86-64 with AVX2, FMA and F16C (Intel from Haswell, AMD from Excavator on).
#include "table.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FOMOE_ISA avx2
#include "kernels.inl.h"

namespace fomoe::cpu {

const Kernels* avx2_kernels() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return nullptr;
  static const Kernels table = avx2::make_table("avx2");
  return &table;
}

}  // namespace fomoe::cpu
#else
namespace fomoe::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace fomoe::cpu
#endif
