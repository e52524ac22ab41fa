// NumPy arrays as arguments of the bindings, read through NumPy's C structures: a tenth of the time
// that the buffer protocol or DLPack take, which matters for 500 calls per token.
#pragma once

// One table of NumPy's functions for the module: module.cpp fills it, others define NO_IMPORT_ARRAY.
#define PY_ARRAY_UNIQUE_SYMBOL fomoe_cpu_numpy
#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#include <nanobind/nanobind.h>
#include <numpy/arrayobject.h>

#include <cstdint>
#include <type_traits>

namespace fomoe::cpu {

template <class T>
constexpr int npy_type() {
  using U = std::remove_const_t<T>;
  if constexpr (std::is_same_v<U, float>) return NPY_FLOAT32;
  if constexpr (std::is_same_v<U, uint8_t>) return NPY_UINT8;
  if constexpr (std::is_same_v<U, int8_t>) return NPY_INT8;
  if constexpr (std::is_same_v<U, int32_t>) return NPY_INT32;
  if constexpr (std::is_same_v<U, uint64_t>) return NPY_UINT64;
}

inline bool is_plain(PyObject* o, int rank, bool writable) {
  if (!PyArray_Check(o)) return false;
  auto* const a = reinterpret_cast<PyArrayObject*>(o);
  const int wanted =
      NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED | (writable ? NPY_ARRAY_WRITEABLE : 0);
  return PyArray_NDIM(a) == rank && PyArray_CHKFLAGS(a, wanted) && PyArray_ISNOTSWAPPED(a);
}

// A C-contiguous array of rank N; the argument tuple keeps it alive during the call. Writable
// unless T is const.
template <class T, int N>
class Array {
 public:
  T* data() const { return static_cast<T*>(PyArray_DATA(array_)); }
  int64_t shape(int i) const { return PyArray_DIM(array_, i); }

  bool take(PyObject* o) {
    array_ = reinterpret_cast<PyArrayObject*>(o);
    return is_plain(o, N, !std::is_const_v<T>) && PyArray_TYPE(array_) == npy_type<T>();
  }

 private:
  PyArrayObject* array_ = nullptr;
};

// Keys or values [positions, heads, head_dim] in float16 or float32.
class CacheArray {
 public:
  void* data() const { return PyArray_DATA(array_); }
  int64_t shape(int i) const { return PyArray_DIM(array_, i); }
  bool f16() const { return PyArray_TYPE(array_) == NPY_FLOAT16; }

  bool take(PyObject* o) {
    array_ = reinterpret_cast<PyArrayObject*>(o);
    return is_plain(o, 3, true) && (f16() || PyArray_TYPE(array_) == NPY_FLOAT32);
  }

 private:
  PyArrayObject* array_ = nullptr;
};

}  // namespace fomoe::cpu

namespace nanobind::detail {

template <class A>
struct array_caster {
  A value;
  static constexpr auto Name = const_name("numpy.ndarray");
  template <class>
  using Cast = A;
  bool from_python(handle o, uint8_t, cleanup_list*) noexcept { return value.take(o.ptr()); }
  template <class>
  bool can_cast() const noexcept {
    return true;
  }
  operator A() const { return value; }
};

template <class T, int N>
struct type_caster<fomoe::cpu::Array<T, N>> : array_caster<fomoe::cpu::Array<T, N>> {};
template <>
struct type_caster<fomoe::cpu::CacheArray> : array_caster<fomoe::cpu::CacheArray> {};

}  // namespace nanobind::detail
