// Checks of arguments that the bindings share; what does not fit becomes a ValueError.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "array.h"
#include "drive.h"

namespace fomoe::cpu {

using Bytes = Array<const uint8_t, 2>;
template <int N>
using In = Array<const float, N>;
template <int N>
using Out = Array<float, N>;
template <int N>
using Ints = Array<const int32_t, N>;

[[noreturn]] inline void fail(const std::string& problem) { throw std::invalid_argument(problem); }

inline void same(const char* what, int64_t found, int64_t wanted) {
  if (found != wanted)
    fail(std::string(what) + " is " + std::to_string(found) + ", must be " +
         std::to_string(wanted));
}

template <class A>
int64_t dim(const A& a, int i) {
  return a.shape(i);
}

inline void check_type(int type, int64_t cols) {
  const TypeShape s = type < 0 || type >= kTypeCount ? TypeShape{} : type_shape(type);
  if (!s.elements) fail("weight type " + std::to_string(type) + " is not supported");
  if (cols % s.elements)
    fail("rows of " + std::to_string(cols) + " values are not whole blocks of " +
         std::to_string(s.elements));
}

inline Matrix matrix(int type, const Bytes& w, int64_t cols) {
  check_type(type, cols);
  const Matrix m{type, w.data(), w.shape(0), cols};
  same("bytes of a weight row", w.shape(1), m.row_bytes());
  return m;
}

inline Cache cache_of(const CacheArray& k, const CacheArray& v) {
  if (k.f16() != v.f16()) fail("the caches must both be float16 or both float32");
  for (int i = 0; i < 3; ++i) same("size of cache_v", dim(v, i), dim(k, i));
  return {k.data(), v.data(), dim(k, 0), dim(k, 1), dim(k, 2), k.f16()};
}

inline void check_positions(const Cache& c, int64_t position0, int64_t tokens) {
  if (position0 < 0 || position0 + tokens > c.positions)
    fail("positions " + std::to_string(position0) + " to " + std::to_string(position0 + tokens) +
         " do not fit a cache of " + std::to_string(c.positions));
}

}  // namespace fomoe::cpu
