// Vectors twice as wide as those of simd.h, and vectors over the rows of a panel.
//
// B64 holds the quants of two groups of 32 values; W16 the numbers of 16 groups. The rows of a
// panel lie side by side in RowFloats and RowInts, kRows of them.
#pragma once

#include "simd.h"

#if defined(FOMOE_SCALAR) || !defined(__AVX2__)
#include "integer_scalar.h"
#include "wide_pair.h"
#elif defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#include "wide_avx512.h"
#else
#include "integer_avx2.h"
#include "wide_pair.h"
#endif
