// Runs a kernel compiled with prelude_cpu.h: every thread of a group is a fiber.
#pragma once
#include <cstdint>
#include <string>

#include "cpu_engine.h"

namespace standin {

// A kernel of a loaded module: how to call it and where its static shared memory lies.
struct Kernel {
    std::string name;
    fm_cpu::Kernel call;
    void (*bind)(fm_cpu::Engine*);
    unsigned wave;
    unsigned char* shared_begin;
    unsigned char* shared_end;
};

struct Shape {
    fm_cpu::Index groups, threads;
    unsigned dynamic_bytes;
};

// Runs all groups, in an order that `seed` chooses, as it does for waves and lanes. Returns an
// empty string, or what the kernel did wrong. One call at a time.
std::string run(const Kernel& kernel, const Shape& shape, void** arguments, uint64_t seed);

}  // namespace standin
