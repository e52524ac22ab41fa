// Threads that share the items of one call, and the working memory of each.
#pragma once

#include <cstdint>

namespace fomoe::cpu {

// Number of threads of a call, the caller included; 1 until it is set. Waits for a running call.
void set_threads(int count);
int thread_count();

using Item = void (*)(const void* body, int64_t item);
// Runs body(item) for 0 <= item < count. Each item runs once, on any thread, in any order. A call
// that finds the threads taken by another one runs alone, so there are never more than were set.
void run_items(int64_t count, Item item, const void* body);

// Work below this many bytes is done by the caller: waking a thread costs more.
constexpr int64_t kInlineBytes = 256 * 1024;

template <class Body>
void parallel(int64_t count, int64_t work_bytes, const Body& body) {
  if (work_bytes < kInlineBytes || count == 1 || thread_count() == 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  run_items(count, [](const void* b, int64_t i) { (*static_cast<const Body*>(b))(i); }, &body);
}

// Working memory of the calling thread, one block per purpose, 64-byte aligned; it grows and stays.
enum class Work : int {
  Row,
  RowChunks,
  UpRowChunks,
  ThirdRowChunks,
  FourthRowChunks,
  Quants,
  Scales,
  Gate,
  Up,
  Hidden,
  HiddenQuants,
  HiddenScales,
  HiddenRows,
  Tiles,
  HiddenTiles,
  Softmax,
  Partial,
  Rotation,
  Keys,
  Tile,
  Layer,
  Positions,
  Count
};
void* work_memory(Work purpose, int64_t bytes);
template <class T>
T* work(Work purpose, int64_t count) {
  return static_cast<T*>(work_memory(purpose, count * static_cast<int64_t>(sizeof(T))));
}

}  // namespace fomoe::cpu
