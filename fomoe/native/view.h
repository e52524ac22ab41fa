// Memory that somebody else owns, and how a native module says that its caller has a bug.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace fomoe {

// Rows of `width` values each; of a vector, single values.
template <class T>
struct View {
  T* data = nullptr;
  int64_t width = 1;

  T* row(int64_t i) const { return data + i * width; }
  T& operator[](int64_t i) const { return data[i]; }
};

// Becomes an AssertionError in Python: the state must not be used any further.
struct Bug : std::logic_error {
  using std::logic_error::logic_error;
};

}  // namespace fomoe
