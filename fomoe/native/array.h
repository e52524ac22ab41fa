// NumPy arrays as arguments of bindings, read through NumPy's C structures: a tenth of the time
// that the buffer protocol or DLPack take, which matters for calls in the layer loop. The module
// calls _import_array() before it binds anything; where several source files include this, they
// share NumPy's table of functions by PY_ARRAY_UNIQUE_SYMBOL.
#pragma once

#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#include <nanobind/nanobind.h>
#include <numpy/arrayobject.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "view.h"

namespace fomoe {

template <class T>
constexpr int npy_type() {
  using U = std::remove_const_t<T>;
  if constexpr (std::is_same_v<U, bool>) return NPY_BOOL;
  if constexpr (std::is_same_v<U, int8_t>) return NPY_INT8;
  if constexpr (std::is_same_v<U, uint8_t>) return NPY_UINT8;
  if constexpr (std::is_same_v<U, uint16_t>) return NPY_UINT16;
  if constexpr (std::is_same_v<U, int32_t>) return NPY_INT32;
  if constexpr (std::is_same_v<U, uint32_t>) return NPY_UINT32;
  if constexpr (std::is_same_v<U, int64_t>) return NPY_INT64;
  if constexpr (std::is_same_v<U, uint64_t>) return NPY_UINT64;
  if constexpr (std::is_same_v<U, float>) return NPY_FLOAT32;
  if constexpr (std::is_same_v<U, double>) return NPY_FLOAT64;
}

// Whether `o` is a C-contiguous array of rank N, which goes to *array.
template <int N>
bool is_plain(PyObject* o, bool writable, PyArrayObject** array) {
  if (!PyArray_Check(o)) return false;
  *array = reinterpret_cast<PyArrayObject*>(o);
  const int wanted =
      NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED | (writable ? NPY_ARRAY_WRITEABLE : 0);
  return PyArray_NDIM(*array) == N && PyArray_CHKFLAGS(*array, wanted) &&
         PyArray_ISNOTSWAPPED(*array);
}

// A C-contiguous array of rank N; the argument tuple keeps it alive during the call. Writable
// unless T is const.
template <class T, int N>
class Array {
 public:
  T* data() const { return static_cast<T*>(PyArray_DATA(array_)); }
  int64_t shape(int i) const { return PyArray_DIM(array_, i); }
  int64_t size() const { return PyArray_SIZE(array_); }
  View<T> view() const { return {data(), N > 1 ? shape(N - 1) : 1}; }

  bool take(PyObject* o) {
    return is_plain<N>(o, !std::is_const_v<T>, &array_) && PyArray_TYPE(array_) == npy_type<T>();
  }

 private:
  PyArrayObject* array_ = nullptr;
};

// A C-contiguous structured array of rank 1 whose records have the size of R.
template <class R>
class Records {
 public:
  R* data() const { return static_cast<R*>(PyArray_DATA(array_)); }
  int64_t size() const { return PyArray_DIM(array_, 0); }

  bool take(PyObject* o) {
    if (!PyArray_Check(o)) return false;
    array_ = reinterpret_cast<PyArrayObject*>(o);
    return PyArray_NDIM(array_) == 1 &&
           PyArray_CHKFLAGS(array_, NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_WRITEABLE) &&
           PyArray_TYPE(array_) == NPY_VOID && PyArray_ITEMSIZE(array_) == sizeof(R);
  }

 private:
  PyArrayObject* array_ = nullptr;
};

inline void same(const char* what, int64_t found, int64_t wanted) {
  if (found != wanted)
    throw std::invalid_argument(std::string(what) + " is " + std::to_string(found) + ", must be " +
                                std::to_string(wanted));
}

}  // namespace fomoe

namespace nanobind::detail {

template <class A>
struct numpy_caster {
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
struct type_caster<fomoe::Array<T, N>> : numpy_caster<fomoe::Array<T, N>> {};
template <class R>
struct type_caster<fomoe::Records<R>> : numpy_caster<fomoe::Records<R>> {};

}  // namespace nanobind::detail
