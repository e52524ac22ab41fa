// Memory that somebody else owns, and how a native module says that its caller has a bug.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace fomoe {

// Brings memory near that is read soon, many lines at a time; what is near costs next to nothing.
inline void ask_for(const void* memory, int64_t bytes) {
  constexpr int64_t kLine = 64;
  const char* const first = static_cast<const char*>(memory);
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(first + at);
}

// Rows of `width` values each; of a vector, single values.
template <class T>
struct View {
  T* data = nullptr;
  int64_t width = 1;

  T* row(int64_t i) const { return data + i * width; }
  void ask_for(int64_t i) const { fomoe::ask_for(row(i), width * int64_t(sizeof(T))); }
  T& operator[](int64_t i) const { return data[i]; }
};

// Becomes an AssertionError in Python: the state must not be used any further.
struct Bug : std::logic_error {
  using std::logic_error::logic_error;
};

}  // namespace fomoe
