// The fabric: one shared memory file per box, through which the processes of an engine talk.
// This comment is the only description of the layout and of the memory ordering.
//
// LAYOUT (every part starts on a page; all integers are little endian, written by this code only)
//   FabricHeader                      once; constant after format(), `magic` is stored last
//   Member[processes]                 process table: bell, sleepers, state, pid, start time
//   for each ring:
//     RingHeader                      ends | head | tail | space, producer_sleepers
//     ring_slots x (SlotHeader + payload of slot_bytes, rounded up to 64)
//   arenas                            raw bytes, whose meaning the engine gives them
// Positions (`head`, `tail`) are 64-bit message counts that never wrap; message p lies in slot
// p % ring_slots. Words that different cores write lie on cache lines of their own.
//
// RING (one producer, one consumer)
//   producer  fill the slot, then head.store(p + 1, release)          "publish"
//   consumer  head.load(acquire) > tail, copy, tail.store(seq_cst)    "consume"
// The acquire/release pair on `head` makes payload, and whatever the producer wrote elsewhere
// before (arenas), visible to the consumer; the pair on `tail` gives the slot back.
//
// BELL (many producers, the threads of one process sleep on it)
//   ringer    P1 publish; P2 bell.fetch_add(1, seq_cst); P3 if sleepers.load(seq_cst) != 0:
//             P4 FUTEX_WAKE(bell, all)
//   waiter    W1 seen = bell.load(acquire); W2 scan the rings, go on if there is a message;
//             W3 sleepers.fetch_add(1, seq_cst); W4 if bell.load(seq_cst) == seen:
//             W5 FUTEX_WAIT(bell, seen); W6 sleepers.fetch_sub(1, seq_cst); W7 back to W1
// P2/P3 and W3/W4 are a store-then-load on both sides: in the single order of sequentially
// consistent operations one of the two sees the other, so either the ringer wakes or the waiter
// does not sleep. Only the sleeper takes its own mark out of `sleepers`: a ringer that cleared it
// could erase the mark of the *next* sleep and nobody would be woken (the model check in
// tests/channel finds that deadlock, and none in this protocol).
//
// SPACE (the producer of a full ring sleeps on it)
//   consumer  C1 tail.store(seq_cst); C2 if producer_sleepers.load(seq_cst) != 0:
//             C3 space.fetch_add(1, seq_cst); C4 FUTEX_WAKE(space, all)
//   producer  S1 seen = space.load(acquire); S2 producer_sleepers.fetch_add(1, seq_cst);
//             S3 if the ring is still full (tail.load(seq_cst)) and the consumer lives:
//             S4 FUTEX_WAIT(space, seen); S5 producer_sleepers.fetch_sub(1, seq_cst)
//
// DEATH
//   Whoever notices that a process is gone sets its state, then bumps and wakes every bell and
//   every `space`. Waiters read the state after they woke, so no sleep outlives the notice.
//
// Futexes are shared ones (the words lie in different address spaces). A sleep lasts at most
// kSliceNs, so that the caller's signal handlers run; a signal ends it early.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fomoe {

constexpr uint64_t kMagic = 0x626166656F6D6F66ull;  // "fomoefab"
constexpr uint32_t kVersion = 1;
constexpr size_t kPage = 4096;
constexpr size_t kLine = 64;
constexpr uint64_t kSliceNs = 100'000'000;

enum State : uint32_t { kAbsent = 0, kJoining = 1, kAlive = 2, kClosed = 3, kDead = 4 };

struct FabricHeader {
    uint64_t magic;
    uint32_t version;
    uint32_t processes;
    uint32_t rings;
    uint32_t arenas;
    uint32_t ring_slots;
    uint32_t slot_bytes;
    uint64_t total_bytes;
    uint8_t fabric_id[16];
    uint8_t spec_digest[32];
};
static_assert(sizeof(FabricHeader) == 88 && sizeof(FabricHeader) <= kPage, "header");
static_assert(offsetof(FabricHeader, total_bytes) == 32, "header");
static_assert(offsetof(FabricHeader, spec_digest) == 56, "header");

struct Member {
    alignas(kLine) uint32_t bell;      // futex; written by every ringer
    alignas(kLine) uint32_t sleepers;  // written by the owner's threads
    alignas(kLine) uint32_t state;     // read by all, written at birth and death
    uint32_t pid;
    uint64_t starttime;
};
static_assert(sizeof(Member) == 3 * kLine && offsetof(Member, sleepers) == kLine, "member");
static_assert(offsetof(Member, state) == 2 * kLine, "member");
static_assert(offsetof(Member, starttime) == 2 * kLine + 8, "member");

struct RingHeader {
    alignas(kLine) uint32_t from;  // constant
    uint32_t to;
    alignas(kLine) uint64_t head;   // written by the producer
    alignas(kLine) uint64_t tail;   // written by the consumer
    alignas(kLine) uint32_t space;  // futex; bumped by the consumer for a sleeping producer
    alignas(kLine) uint32_t producer_sleepers;
};
static_assert(sizeof(RingHeader) == 5 * kLine, "ring");
static_assert(offsetof(RingHeader, head) == kLine && offsetof(RingHeader, tail) == 2 * kLine &&
                  offsetof(RingHeader, space) == 3 * kLine &&
                  offsetof(RingHeader, producer_sleepers) == 4 * kLine,
              "ring");

struct alignas(kLine) SlotHeader {
    uint64_t position;  // equals the message count: a torn or foreign write is noticed
    uint32_t tag;
    uint32_t nbytes;
};
static_assert(sizeof(SlotHeader) == kLine, "slot");

constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Byte offsets of every part, a function of the spec's numbers alone.
struct Layout {
    uint32_t processes, rings, ring_slots, slot_bytes;
    std::vector<uint64_t> arena_offsets, arena_bytes;
    uint64_t total_bytes = 0;

    Layout(uint32_t processes, uint32_t rings, std::vector<uint64_t> arenas, uint32_t ring_slots,
           uint32_t slot_bytes)
        : processes(processes), rings(rings), ring_slots(ring_slots), slot_bytes(slot_bytes),
          arena_bytes(std::move(arenas)) {
        uint64_t at = first_ring() + uint64_t(rings) * ring_bytes();
        for (uint64_t nbytes : arena_bytes) {
            arena_offsets.push_back(at);
            at += round_up(nbytes, kPage);
        }
        total_bytes = at;
    }
    size_t first_member() const { return kPage; }
    size_t first_ring() const { return kPage + round_up(processes * sizeof(Member), kPage); }
    size_t slot_stride() const { return sizeof(SlotHeader) + round_up(slot_bytes, kLine); }
    size_t ring_bytes() const {
        return round_up(sizeof(RingHeader) + ring_slots * slot_stride(), kPage);
    }
};

}  // namespace fomoe
