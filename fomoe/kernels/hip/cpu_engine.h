// What a kernel compiled for the CPU knows of the engine that runs it, lane by lane.
#pragma once

namespace fm_cpu {

struct Index {
    unsigned x, y, z;
};

constexpr unsigned kSlotBytes = 64;  // the most that a lane may show to its wave at once

enum Operation : unsigned { kXor = 1, kTile, kSum, kMax, kSync };

// One running group. The engine keeps the indices of the lane that runs; a lane calls the functions.
struct Engine {
    Index thread, group, threads, groups;
    unsigned lane;
    unsigned char* dynamic;  // shared memory that the launch asked for

    // Shows `bytes` of `value` to the wave, waits until every lane has come to the same `kind` of
    // operation, and returns what all lanes showed, kSlotBytes apart, valid until the next call.
    const unsigned char* (*exchange)(const void* value, unsigned bytes, Operation kind);
    // Sum or largest of the wave's values by the butterfly over masks 1, 2, 4 .. wave / 2, which is
    // the order, and gives the bits, of all devices.
    float (*reduce)(float value, Operation kind);
    void (*barrier)();                         // waits for every thread of the group
    void (*copy16)(void* to, const void* from);  // arrives when it is waited for, not before
    void (*copy_commit)();
    void (*copy_wait)(unsigned newest);  // all but the newest so many commits have arrived
    void (*fail)(const char* what);      // ends the launch with an error; does not return
};

// A kernel as the engine calls it: `arguments` points to the address of each argument.
using Kernel = void (*)(void** arguments);

}  // namespace fm_cpu
