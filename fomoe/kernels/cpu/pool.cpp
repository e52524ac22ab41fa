#include "pool.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace fomoe::cpu {
namespace {

using Clock = std::chrono::steady_clock;
using Word = std::atomic<uint32_t>;

// Threads look for work this long before they give the core away: the gap between two products of
// a layer is shorter, that between two layers often not.
constexpr std::chrono::microseconds kSpin{15};
constexpr int kYields = 4;                     // then this often, before they sleep
constexpr timespec kNap{0, 10 * 1000 * 1000};  // a sleeping caller looks again after 10 ms

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Sleeps while the word has this value; wakes early for no reason at times.
void sleep_while(const Word& word, uint32_t value, const timespec* limit) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, limit, nullptr, 0);
}
void wake_all(const Word& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// Whether ready() came true while spinning and yielding.
template <class Ready>
bool spin_until(const Ready& ready) {
  const auto end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (Clock::now() < end);
  for (int i = 0; i < kYields; ++i) {
    sched_yield();
    if (ready()) return true;
  }
  return false;
}

// The items [begin, end) that are left of a thread's share, in one word: the owner takes from the
// front, others from the back, so that a thread that lost its core holds up one item at most.
class alignas(64) Share {
 public:
  void set(uint32_t begin, uint32_t end) {
    left_.store(pack(begin, end), std::memory_order_release);
  }
  bool take_first(uint32_t* item) {
    return take([&](uint32_t begin, uint32_t end) {
      *item = begin;
      return pack(begin + 1, end);
    });
  }
  bool take_last(uint32_t* item) {
    return take([&](uint32_t begin, uint32_t end) {
      *item = end - 1;
      return pack(begin, end - 1);
    });
  }

 private:
  static uint64_t pack(uint32_t begin, uint32_t end) { return uint64_t{end} << 32 | begin; }
  template <class Rest>
  bool take(const Rest& rest) {
    uint64_t left = left_.load(std::memory_order_acquire);
    for (;;) {
      const auto begin = static_cast<uint32_t>(left), end = static_cast<uint32_t>(left >> 32);
      if (begin >= end) return false;
      if (left_.compare_exchange_weak(left, rest(begin, end), std::memory_order_acq_rel,
                                      std::memory_order_acquire))
        return true;
    }
  }

  std::atomic<uint64_t> left_{0};
};

// A call publishes its items as shares and is over when none is pending. A thread that comes late
// finds all shares empty, or those of the next call, which are as good: what to run is read after
// an item was taken, and cannot change until that item is done.
class Pool {
 public:
  void resize(int count) {
    while (busy_.exchange(true, std::memory_order_acquire)) std::this_thread::yield();
    stopping_.store(true);
    announce();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stopping_.store(false);
    const int size = count < 1 ? 1 : count;
    shares_ = std::make_unique<Share[]>(static_cast<size_t>(size));
    count_.store(size);
    for (int i = 1; i < size; ++i) workers_.emplace_back([this, i] { serve(i); });
    busy_.store(false, std::memory_order_release);
  }

  int size() const { return count_.load(std::memory_order_relaxed); }

  void run(int64_t count, Item item, const void* body) {
    if (busy_.load(std::memory_order_relaxed) || count > INT_MAX ||
        busy_.exchange(true, std::memory_order_acquire)) {
      for (int64_t i = 0; i < count; ++i) item(body, i);
      return;
    }
    item_ = item;
    body_ = body;
    pending_.store(static_cast<uint32_t>(count), std::memory_order_relaxed);
    const int64_t threads = size();
    for (int64_t i = 0; i < threads; ++i)
      shares_[i].set(static_cast<uint32_t>(count * i / threads),
                     static_cast<uint32_t>(count * (i + 1) / threads));
    announce();
    work_on(0);
    wait_for_others();
    busy_.store(false, std::memory_order_release);
  }

 private:
  void announce() {
    call_.fetch_add(1);
    if (sleepers_.load() != 0) wake_all(call_);
  }

  // Runs items until all shares are empty.
  void work_on(int own) {
    const int threads = size();
    uint32_t done = 0, item;
    for (; shares_[own].take_first(&item); ++done) item_(body_, item);
    for (int i = 1; i < threads; ++i)
      for (Share& other = shares_[(own + i) % threads]; other.take_last(&item); ++done)
        item_(body_, item);
    if (done && pending_.fetch_sub(done) == done && caller_sleeps_.load()) wake_all(pending_);
  }

  void wait_for_others() {
    const auto over = [this] { return pending_.load(std::memory_order_acquire) == 0; };
    if (over() || spin_until(over)) return;
    caller_sleeps_.store(true);
    for (uint32_t left; (left = pending_.load()) != 0;) sleep_while(pending_, left, &kNap);
    caller_sleeps_.store(false);
  }

  void serve(int own) {
    // A call announced before this thread looked is picked up all the same.
    for (uint32_t seen = call_.load();;) {
      if (stopping_.load()) return;
      work_on(own);
      const auto called = [&] { return call_.load(std::memory_order_acquire) != seen; };
      if (!spin_until(called)) {
        sleepers_.fetch_add(1);
        while (call_.load() == seen) sleep_while(call_, seen, nullptr);
        sleepers_.fetch_sub(1);
      }
      seen = call_.load();
    }
  }

  // Words that threads spin on lie apart from those that are written for each item.
  alignas(64) Word call_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  alignas(64) Word pending_{0};
  std::atomic<bool> caller_sleeps_{false};
  alignas(64) std::atomic<bool> busy_{false};  // set by the caller whose items run
  Item item_ = nullptr;
  const void* body_ = nullptr;
  std::unique_ptr<Share[]> shares_ = std::make_unique<Share[]>(1);
  std::atomic<int> count_{1};
  std::vector<std::thread> workers_;
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
