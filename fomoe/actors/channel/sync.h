// Atomics on shared words, shared futexes and the bounded spin-then-sleep.
#pragma once

#include <climits>
#include <cstdint>
#include <ctime>

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "layout.h"

namespace fomoe {

template <class T> T load_relaxed(const T* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
template <class T> T load_acquire(const T* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
template <class T> T load_ordered(const T* p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
template <class T> void store_release(T* p, T v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
template <class T> void store_ordered(T* p, T v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
inline void add_ordered(uint32_t* p, uint32_t n) { __atomic_fetch_add(p, n, __ATOMIC_SEQ_CST); }

static_assert(__atomic_always_lock_free(sizeof(uint64_t), nullptr), "words shared by processes");

inline uint64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return uint64_t(t.tv_sec) * 1'000'000'000ull + uint64_t(t.tv_nsec);
}

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

inline void futex_wake(uint32_t* word) {
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Returns on a wake, a changed word, a signal or the timeout; the caller looks again anyway.
inline void futex_wait(uint32_t* word, uint32_t seen, uint64_t ns) {
    timespec t{time_t(ns / 1'000'000'000ull), long(ns % 1'000'000'000ull)};
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &t, nullptr, 0);
}

// Bumps a futex word and wakes its sleepers, if it has any.
inline void bump(uint32_t* word, const uint32_t* sleepers) {
    add_ordered(word, 1);
    if (load_ordered(sleepers) != 0) futex_wake(word);
}

// Spins for at most `ns`, true as soon as ready() is. It yields every 32 rounds: a spin that only
// pauses costs a scheduler tick whenever both ends share a core.
template <class Ready> bool spin_until(Ready ready, uint64_t ns) {
    if (ns == 0) return ready();
    for (const uint64_t end = now_ns() + ns;;) {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
            relax();
        }
        sched_yield();
        if (now_ns() >= end) return ready();
    }
}

// One sleep of at most min(ns, kSliceNs) on `word`, unless ready() holds after the mark is set.
template <class Ready>
void sleep_once(uint32_t* word, uint32_t seen, uint32_t* sleepers, Ready ready, uint64_t ns) {
    add_ordered(sleepers, 1);
    if (!ready()) futex_wait(word, seen, ns < kSliceNs ? ns : kSliceNs);
    add_ordered(sleepers, uint32_t(-1));
}

}  // namespace fomoe
