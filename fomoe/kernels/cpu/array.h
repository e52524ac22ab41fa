// NumPy arrays as arguments of the kernels' bindings.
#pragma once

// One table of NumPy's functions for the module: module.cpp fills it, others define NO_IMPORT_ARRAY.
#define PY_ARRAY_UNIQUE_SYMBOL fomoe_cpu_numpy
#include "fomoe/native/array.h"

namespace fomoe::cpu {

// Keys or values [positions, heads, head_dim] in float16 or float32.
class CacheArray {
 public:
  void* data() const { return PyArray_DATA(array_); }
  int64_t shape(int i) const { return PyArray_DIM(array_, i); }
  bool f16() const { return PyArray_TYPE(array_) == NPY_FLOAT16; }

  bool take(PyObject* o) { return is_plain<3>(o, true, &array_) && is_float(); }

 private:
  bool is_float() const { return f16() || PyArray_TYPE(array_) == NPY_FLOAT32; }

  PyArrayObject* array_ = nullptr;
};

}  // namespace fomoe::cpu

namespace nanobind::detail {

template <>
struct type_caster<fomoe::cpu::CacheArray> : numpy_caster<fomoe::cpu::CacheArray> {};

}  // namespace nanobind::detail
