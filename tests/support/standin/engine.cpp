#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

// Saves the caller's registers on its stack, the stack in *from, and continues on `to`.
extern "C" void fm_switch(void** from, void* to);
asm(R"(.text
.type fm_switch,@function
fm_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size fm_switch, .-fm_switch
)");

namespace standin {
namespace {

// Of one thread. Not a power of two: the tops of all stacks would share a few lines of the cache.
constexpr size_t kStackBytes = (64 << 10) + 576;
constexpr size_t kPage = 4096;
constexpr size_t kDynamicBytes = 256 << 10;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned char kPoison = 0xff;  // a NaN as float, -1 as int: shared memory starts with it
constexpr uint64_t kCanary = 0x5afe5afe5afe5afe;

enum class State { ready, at_wave, at_barrier, done };

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    unsigned commit;
};

struct Fiber {
    void* stack;
    fm_cpu::Index thread;
    State state;
    unsigned kind;   // of the wave operation it waits at
    unsigned commits;
    std::vector<Copy> copies;
};

struct Run {
    const Kernel* kernel;
    void** arguments;
    std::mt19937_64 random;
    std::vector<Fiber> fibers;
    std::vector<unsigned> order;  // fibers as they run: whole waves, shuffled inside and among them
    std::vector<unsigned> turn;   // per wave: which of its two rows of slots is written
    std::string problem;
    unsigned running;
    void* scheduler;
};

fm_cpu::Engine engine;
Run run_state;
alignas(64) unsigned char slots[2][kMaxThreads][fm_cpu::kSlotBytes];

unsigned char* map(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("no memory for the emulated GPU's stacks");
    return static_cast<unsigned char*>(p);
}

unsigned char* stacks() {
    static unsigned char* all = map(kMaxThreads * kStackBytes);
    return all;
}

// The end of dynamic shared memory; the page behind it cannot be touched.
unsigned char* dynamic_end() {
    static unsigned char* end = [] {
        unsigned char* begin = map(kDynamicBytes + kPage);
        mprotect(begin + kDynamicBytes, kPage, PROT_NONE);
        return begin + kDynamicBytes;
    }();
    return end;
}

uint64_t& canary(unsigned fiber) {
    return *reinterpret_cast<uint64_t*>(stacks() + fiber * kStackBytes);
}

void leave(State state) {
    Fiber& me = run_state.fibers[run_state.running];
    me.state = state;
    fm_switch(&me.stack, run_state.scheduler);
}

void fail(const char* what) {
    if (!run_state.problem.empty()) leave(State::done);  // the first one is told
    char text[512];
    const auto &g = engine.group, &t = engine.thread;
    snprintf(text, sizeof(text), "kernel %s, group (%u, %u, %u), thread (%u, %u, %u): %s",
             run_state.kernel->name.c_str(), g.x, g.y, g.z, t.x, t.y, t.z, what);
    run_state.problem = text;
    leave(State::done);
    __builtin_unreachable();
}

const unsigned char* exchange(const void* value, unsigned bytes, fm_cpu::Operation kind) {
    const unsigned me = run_state.running, wave = run_state.kernel->wave, first = me / wave * wave;
    const unsigned row = run_state.turn[me / wave] & 1;
    memcpy(slots[row][me], value, bytes);
    run_state.fibers[me].kind = kind << 8 | bytes;
    leave(State::at_wave);
    return slots[row][first];
}

float reduce(float value, fm_cpu::Operation kind) {
    float result;
    memcpy(&result, exchange(&value, sizeof(value), kind), sizeof(result));
    return result;
}

// Leaves the result of a reduction in the slot of the wave's first lane.
void join_slots(unsigned first_lane, fm_cpu::Operation kind) {
    const unsigned wave = run_state.kernel->wave;
    auto* shown = slots[run_state.turn[first_lane / wave] & 1] + first_lane;
    auto value = [&](unsigned lane) -> float& { return *reinterpret_cast<float*>(shown[lane]); };
    for (unsigned mask = 1; mask < wave; mask *= 2)
        for (unsigned i = 0; i < wave; i += 2 * mask)
            value(i) = kind == fm_cpu::kSum ? value(i) + value(i + mask) : fmaxf(value(i), value(i + mask));
}

void barrier() { leave(State::at_barrier); }

void copy16(void* to, const void* from) {
    Fiber& me = run_state.fibers[run_state.running];
    memset(to, kPoison, 16);  // who reads before waiting reads this
    me.copies.push_back({static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), me.commits});
}

void copy_commit() { run_state.fibers[run_state.running].commits++; }

void copy_wait(unsigned newest) {
    Fiber& me = run_state.fibers[run_state.running];
    auto arrives = [&](const Copy& c) { return c.commit + newest < me.commits; };
    for (const Copy& c : me.copies)
        if (arrives(c)) memcpy(c.to, c.from, 16);
    me.copies.erase(std::remove_if(me.copies.begin(), me.copies.end(), arrives), me.copies.end());
}

void enter() {
    run_state.kernel->call(run_state.arguments);
    if (!run_state.fibers[run_state.running].copies.empty()) fail("ends with copies that were not waited for");
    leave(State::done);
    __builtin_unreachable();
}

void* fresh_stack(unsigned fiber) {
    canary(fiber) = kCanary;
    auto* top = reinterpret_cast<void**>(stacks() + (fiber + 1) * kStackBytes - 64);
    *--top = nullptr;  // enter() has no caller
    *--top = reinterpret_cast<void*>(enter);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    return top;
}

void shuffle_order() {
    const unsigned wave = run_state.kernel->wave, n = run_state.fibers.size();
    std::vector<unsigned> waves(n / wave);
    for (unsigned i = 0; i < waves.size(); i++) waves[i] = i;
    std::shuffle(waves.begin(), waves.end(), run_state.random);
    run_state.order.clear();
    for (unsigned w : waves) {
        for (unsigned lane = 0; lane < wave; lane++) run_state.order.push_back(w * wave + lane);
        std::shuffle(run_state.order.end() - wave, run_state.order.end(), run_state.random);
    }
}

void resume(unsigned fiber) {
    run_state.running = fiber;
    engine.thread = run_state.fibers[fiber].thread;
    engine.lane = fiber % run_state.kernel->wave;
    fm_switch(&run_state.scheduler, run_state.fibers[fiber].stack);
}

bool all_in(const unsigned* first, unsigned n, State state) {
    return std::all_of(first, first + n, [&](unsigned i) { return run_state.fibers[i].state == state; });
}

const char* part_ways(const unsigned* lanes, unsigned n) {
    const Fiber& first = run_state.fibers[lanes[0]];
    for (unsigned i = 0; i < n; i++) {
        const Fiber& f = run_state.fibers[lanes[i]];
        if (f.state != State::at_wave) return "a wave operation that not every lane of the wave comes to";
        if (f.kind != first.kind) return "lanes of a wave are at different wave operations";
    }
    return nullptr;
}

// Runs a wave until its lanes wait for the group or have ended. False: a problem.
bool run_wave(const unsigned* lanes, unsigned wave) {
    for (;;) {
        bool waits = false;
        for (unsigned i = 0; i < wave; i++) {
            Fiber& fiber = run_state.fibers[lanes[i]];
            if (fiber.state == State::ready) resume(lanes[i]);
            waits |= fiber.state == State::at_wave;
        }
        if (!run_state.problem.empty()) return false;
        if (!waits) return true;
        if (const char* problem = part_ways(lanes, wave)) {
            run_state.problem = "kernel " + run_state.kernel->name + ": " + problem;
            return false;
        }
        const auto kind = fm_cpu::Operation(run_state.fibers[lanes[0]].kind >> 8);
        const unsigned number = lanes[0] / wave;
        if (kind == fm_cpu::kSum || kind == fm_cpu::kMax) join_slots(number * wave, kind);
        run_state.turn[number]++;
        for (unsigned i = 0; i < wave; i++) run_state.fibers[lanes[i]].state = State::ready;
    }
}

void begin_group(const Shape& shape) {
    const unsigned n = run_state.fibers.size(), nx = shape.threads.x, ny = shape.threads.y;
    for (unsigned i = 0; i < n; i++) {
        const fm_cpu::Index thread{i % nx, i / nx % ny, i / (nx * ny)};
        run_state.fibers[i] = {fresh_stack(i), thread, State::ready, 0, 0, {}};
    }
    run_state.turn.assign(n / run_state.kernel->wave, 0);
    memset(run_state.kernel->shared_begin, kPoison, run_state.kernel->shared_end - run_state.kernel->shared_begin);
    engine.dynamic = dynamic_end() - (shape.dynamic_bytes + 15) / 16 * 16;
    memset(engine.dynamic, kPoison, shape.dynamic_bytes);
    shuffle_order();
}

void check_stacks() {
    for (unsigned i = 0; i < run_state.fibers.size(); i++)
        if (canary(i) != kCanary) run_state.problem = "kernel " + run_state.kernel->name + ": a thread's locals exceed 64 kB";
}

void run_group(const Shape& shape) {
    begin_group(shape);
    const unsigned n = run_state.fibers.size(), wave = run_state.kernel->wave;
    const unsigned* order = run_state.order.data();
    for (;;) {
        for (unsigned first = 0; first < n; first += wave)
            if (!run_wave(order + first, wave)) return;
        if (all_in(order, n, State::done)) return check_stacks();
        if (!all_in(order, n, State::at_barrier)) {
            run_state.problem = "kernel " + run_state.kernel->name + ": a barrier that not every thread of the group comes to";
            return;
        }
        for (Fiber& f : run_state.fibers) f.state = State::ready;
    }
}

const char* refusal(const Kernel& kernel, const Shape& shape, uint64_t threads) {
    const uint64_t groups = uint64_t(shape.groups.x) * shape.groups.y * shape.groups.z;
    if (groups == 0 || threads == 0) return "an empty grid or group";
    if (shape.groups.y > 65535 || shape.groups.z > 65535) return "more than 65,535 groups in y or z";
    if (threads > kMaxThreads) return "more than 1,024 threads in a group";
    if (threads % kernel.wave) return "a group that is not made of whole waves";
    if (shape.dynamic_bytes > kDynamicBytes) return "more than 256 KiB of shared memory";
    return nullptr;
}

}  // namespace

std::string run(const Kernel& kernel, const Shape& shape, void** arguments, uint64_t seed) {
    const uint64_t threads = uint64_t(shape.threads.x) * shape.threads.y * shape.threads.z;
    if (const char* problem = refusal(kernel, shape, threads)) return "kernel " + kernel.name + ": " + problem;
    engine = {{}, {}, shape.threads, shape.groups, 0, nullptr, exchange, reduce, barrier, copy16, copy_commit, copy_wait, fail};
    kernel.bind(&engine);
    run_state.kernel = &kernel;
    run_state.arguments = arguments;
    run_state.random.seed(seed);
    run_state.problem.clear();
    run_state.fibers.resize(threads);

    std::vector<fm_cpu::Index> groups;
    for (unsigned z = 0; z < shape.groups.z; z++)
        for (unsigned y = 0; y < shape.groups.y; y++)
            for (unsigned x = 0; x < shape.groups.x; x++) groups.push_back({x, y, z});
    std::shuffle(groups.begin(), groups.end(), run_state.random);
    for (const auto& group : groups) {
        engine.group = group;
        run_group(shape);
        if (!run_state.problem.empty()) break;
    }
    return run_state.problem;
}

}  // namespace standin
