// Kernels for any machine.
#define FOMOE_ISA scalar
#define FOMOE_SCALAR
#include "kernels.inl.h"

namespace fomoe::cpu {

const Kernels* scalar_kernels() {
  static const Kernels table = scalar::make_table("scalar");
  return &table;
}

}  // namespace fomoe::cpu
