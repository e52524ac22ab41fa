#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace fomoe::cpu {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Rounds of looking for the next call before a thread sleeps: some 10 us, the gap between two
// products of one layer.
constexpr int kSpins = 400;

class Pool {
 public:
  ~Pool() { stop(); }

  void resize(int count) {
    std::lock_guard<std::mutex> only(owner_);
    stop();
    stopping_ = false;
    for (int i = 1; i < count; ++i) workers_.emplace_back([this] { serve(); });
    count_.store(count < 1 ? 1 : count);
  }

  int size() const { return count_.load(std::memory_order_relaxed); }

  void run(int64_t count, Item item, const void* body) {
    std::unique_lock<std::mutex> only(owner_, std::try_to_lock);
    if (!only.owns_lock()) {
      for (int64_t i = 0; i < count; ++i) item(body, i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      item_ = item;
      body_ = body;
      total_ = count;
      next_.store(0, std::memory_order_relaxed);
      open_ = true;
      call_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take_items();
    // A worker that has not entered by now finds the call closed and does nothing.
    {
      std::lock_guard<std::mutex> lock(mutex_);
      open_ = false;
    }
    for (int i = 0; i < kSpins && active_.load(std::memory_order_acquire) != 0; ++i) relax();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_.load(std::memory_order_acquire) == 0; });
  }

 private:
  void take_items() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < total_;) item_(body_, i);
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && call_.load(std::memory_order_acquire) == seen; ++i) relax();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stopping_ || call_.load() != seen; });
        if (stopping_) return;
        seen = call_.load();
        if (!open_) continue;
        active_.fetch_add(1, std::memory_order_relaxed);
      }
      take_items();
      std::lock_guard<std::mutex> lock(mutex_);
      if (active_.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.notify_one();
    }
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  std::mutex owner_;  // held by the caller whose items run
  std::mutex mutex_;  // guards everything below but the atomics
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  bool stopping_ = false, open_ = false;
  Item item_ = nullptr;
  const void* body_ = nullptr;
  int64_t total_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<uint64_t> call_{0};
  std::atomic<int> active_{0};
  std::atomic<int> count_{1};
};

// Never destroyed: at exit the interpreter may still hold threads inside a call.
Pool& pool() {
  static Pool* const only = new Pool;
  return *only;
}

struct Block {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Block() { std::free(data); }
};

}  // namespace

void set_threads(int count) { pool().resize(count); }
int thread_count() { return pool().size(); }
void run_items(int64_t count, Item item, const void* body) { pool().run(count, item, body); }

void* work_memory(Work purpose, int64_t bytes) {
  thread_local Block blocks[static_cast<int>(Work::Count)];
  Block& block = blocks[static_cast<int>(purpose)];
  if (block.bytes < bytes) {
    std::free(block.data);
    block.bytes = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    block.data = std::aligned_alloc(64, static_cast<size_t>(block.bytes));
    if (!block.data) {
      block.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return block.data;
}

}  // namespace fomoe::cpu
