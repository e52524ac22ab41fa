// How a chunk of a weight type meets the activations in dot_rows.h.
#pragma once

#include "chunk.h"

namespace fomoe::cpu::FOMOE_ISA {

// The order of quants and groups is free as long as RowChunk is arranged in the same one and
// natural() puts the groups back.
template <class T>
struct RowForm {
  static FOMOE_INLINE void unpack(const uint8_t* p, typename T::C& c) { T::unpack(p, c); }
  static FOMOE_INLINE Lanes<T::group> dots(const B64* q, const int8_t* x) {
    return group_dots<T::group, T::shape.bias>(q, x);
  }
  static Lanes<T::group> natural(Lanes<T::group> partials) { return partials; }
  static void arrange(RowChunk&) {}
};

}  // namespace fomoe::cpu::FOMOE_ISA

#if !defined(FOMOE_SCALAR) && defined(__AVX512VBMI__)
#include "row_form_avx512.h"
#endif
