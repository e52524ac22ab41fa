// The vectors of the instruction set that this translation unit is compiled for.
#pragma once

// Vectors stay in registers only where what is done with them is inlined, whatever its size.
#define FOMOE_INLINE inline __attribute__((always_inline))

#if !defined(FOMOE_SCALAR) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#else
#include "simd_scalar.h"
#endif
