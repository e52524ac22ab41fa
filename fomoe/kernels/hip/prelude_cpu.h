// The names of a kernel's world where a CPU stands in for a GPU; see cpu_engine.h for who runs it.
// Built by g++; FM_WAVE is 32 or 64.
#pragma once
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS  // C's own: C++'s takes longer than most kernels do
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#include "cpu_engine.h"

#if FM_WAVE != 32 && FM_WAVE != 64
#error FM_WAVE is 32 or 64
#endif

// ---- what the engine finds in a module by name
static fm_cpu::Engine* fm_engine;
extern "C" {
__attribute__((visibility("default"))) unsigned fm_wave = FM_WAVE;
__attribute__((visibility("default"))) void fm_bind(fm_cpu::Engine* engine) { fm_engine = engine; }
}

namespace fm_cpu {
template <class... A, size_t... I>
void call_with(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}
template <class... A>
void call(void (*kernel)(A...), void** arguments) {
    call_with(kernel, arguments, std::index_sequence_for<A...>{});
}
template <class... A>
unsigned sizes(void (*)(A...), unsigned* out) {
    const unsigned all[] = {unsigned(sizeof(A))..., 0};
    memcpy(out, all, sizeof(unsigned) * sizeof...(A));
    return sizeof...(A);
}
}  // namespace fm_cpu

// ---- declarations
#define FM_KERNEL(max_threads) extern "C" __attribute__((annotate("fm_kernel")))
#define FM_DEV inline
#define FM_SHARED alignas(16) __attribute__((section("fm_shared"))) static
#define FM_DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(fm_engine->dynamic)
#define FM_UNROLL _Pragma("GCC unroll 16")
#define FM_NO_UNROLL _Pragma("GCC unroll 1")
#define threadIdx (fm_engine->thread)
#define blockIdx (fm_engine->group)
#define blockDim (fm_engine->threads)
#define gridDim (fm_engine->groups)

struct alignas(16) fm_u4 { unsigned x, y, z, w; };
struct alignas(16) fm_f4 { float x, y, z, w; };
struct alignas(8) fm_u2 { unsigned x, y; };
struct alignas(8) fm_f2 { float x, y; };

// ---- numbers
template <class To, class From>
FM_DEV To fm_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}
FM_DEV float fm_h2f(unsigned bits) { return float(fm_bits<_Float16>(uint16_t(bits))); }
FM_DEV unsigned fm_f2h(float value) { return fm_bits<uint16_t>(_Float16(value)); }
FM_DEV float fm_bf2f(unsigned bits) { return fm_bits<float>(bits << 16); }
FM_DEV float fm_exp(float x) { return expf(x); }
FM_DEV float fm_log(float x) { return logf(x); }
FM_DEV float fm_sqrt(float x) { return sqrtf(x); }
FM_DEV float fm_rint(float x) { return rintf(x); }
FM_DEV float fm_fma(float a, float b, float c) { return fmaf(a, b, c); }
FM_DEV float fm_abs(float x) { return fabsf(x); }
FM_DEV float fm_max(float a, float b) { return fmaxf(a, b); }
FM_DEV float fm_min(float a, float b) { return fminf(a, b); }
FM_DEV int fm_dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += int8_t(a >> i) * int8_t(b >> i);
    return c;
}
#include "trig.h"

// The bytes of `table` (16 of them in 4 words) that the low and the high nibbles of q's bytes choose.
FM_DEV void fm_levels(unsigned q, unsigned t0, unsigned t1, unsigned t2, unsigned t3, unsigned& low, unsigned& high) {
    const unsigned table[4] = {t0, t1, t2, t3};
    low = high = 0;
    for (int i = 0; i < 32; i += 8) {
        const unsigned a = q >> i & 15, b = q >> i >> 4 & 15;
        low |= (table[a / 4] >> a % 4 * 8 & 255) << i;
        high |= (table[b / 4] >> b % 4 * 8 & 255) << i;
    }
}

// ---- memory
FM_DEV void fm_check_16(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % 16) fm_engine->fail("16 bytes at an address that is not a multiple of 16");
}
FM_DEV fm_u4 fm_load16(const void* p) {
    fm_check_16(p);
    return *static_cast<const fm_u4*>(p);
}
FM_DEV void fm_copy16(void* shared, const void* global) {
    fm_check_16(shared);
    fm_check_16(global);
    fm_engine->copy16(shared, global);
}
FM_DEV void fm_copy_commit() { fm_engine->copy_commit(); }
template <int N>
FM_DEV void fm_copy_wait() {
    fm_engine->copy_wait(N);
}
FM_DEV void fm_fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
FM_DEV unsigned fm_atomic_add(unsigned* p, unsigned value) {
    return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);
}
FM_DEV unsigned long long fm_clock() { return __builtin_ia32_rdtsc(); }

// ---- launches: fm_release_next lets the next one of the stream start beside this one, as far as it
// gets before its fm_wait_before, which waits until the one before has ended. Launch.early asks for it.
FM_DEV void fm_wait_before() {}
FM_DEV void fm_release_next() {}

// ---- groups and waves
FM_DEV void fm_barrier() { fm_engine->barrier(); }
FM_DEV int fm_lane() { return int(fm_engine->lane); }
FM_DEV int fm_thread() {
    const fm_cpu::Index &t = threadIdx, &n = blockDim;
    return int(t.x + n.x * (t.y + n.y * t.z));
}

template <class T>
FM_DEV T fm_from_lane(const unsigned char* shown, unsigned lane) {
    T value;
    memcpy(&value, shown + lane * fm_cpu::kSlotBytes, sizeof(T));
    return value;
}
template <class T>
FM_DEV T fm_wave_xor(T value, int mask) {
    static_assert(sizeof(T) == 4, "4 bytes");
    return fm_from_lane<T>(fm_engine->exchange(&value, sizeof(T), fm_cpu::kXor), (fm_lane() ^ mask) % FM_WAVE);
}
// The value of the wave's first lane in all of them, which compilers then keep once for the wave.
FM_DEV int fm_uniform(int value) { return fm_from_lane<int>(fm_engine->exchange(&value, sizeof(value), fm_cpu::kXor), 0); }
// Orders what the lanes of a wave wrote to shared memory, and what came there by fm_copy16.
FM_DEV void fm_wave_sync() {
    const int nothing = 0;
    fm_engine->exchange(&nothing, sizeof(nothing), fm_cpu::kSync);
}
FM_DEV float fm_wave_sum(float value) { return fm_engine->reduce(value, fm_cpu::kSum); }
FM_DEV float fm_wave_max(float value) { return fm_engine->reduce(value, fm_cpu::kMax); }

// ---- matrix tiles: a wave's fragments of int8 [16][32] and its share of int32 [16][16]
constexpr int FM_TILE_REGS = 256 / FM_WAVE;
constexpr int FM_TILE_PART = 512 / FM_WAVE;  // bytes of a fragment that one lane holds
struct fm_tile_a { signed char part[FM_TILE_PART]; };
struct fm_tile_b { signed char part[FM_TILE_PART]; };
struct fm_tile_c {
    int reg[FM_TILE_REGS];
    int& operator[](int i) { return reg[i]; }
    const int& operator[](int i) const { return reg[i]; }
};
template <class Tile>
FM_DEV Tile fm_tile_load(const signed char* shared, int stride) {
    fm_check_16(shared);
    if (stride % 16) fm_engine->fail("a tile's stride is no multiple of 16 bytes");
    constexpr int kParts = 32 / FM_TILE_PART;  // lanes that share a row
    Tile tile;
    memcpy(tile.part, shared + fm_lane() / kParts * stride + fm_lane() % kParts * FM_TILE_PART, FM_TILE_PART);
    return tile;
}
FM_DEV fm_tile_a fm_tile_load_a(const signed char* shared, int stride) { return fm_tile_load<fm_tile_a>(shared, stride); }
FM_DEV fm_tile_b fm_tile_load_b(const signed char* shared, int stride) { return fm_tile_load<fm_tile_b>(shared, stride); }
FM_DEV fm_tile_c fm_tile_zero() { return fm_tile_c{}; }
// Where registers lie differs between devices; here wave 32 is as mma.sync has it, 64 as MFMA.
FM_DEV int fm_tile_row(int i) {
    return FM_WAVE == 32 ? fm_lane() / 4 + 8 * (i / 2 % 2) : 4 * (fm_lane() / 16) + i;
}
FM_DEV int fm_tile_col(int i) {
    return FM_WAVE == 32 ? fm_lane() % 4 * 2 + i % 2 + 8 * (i / 4) : fm_lane() % 16;
}
// Over k from `begin` to `end`, multiples of FM_TILE_PART.
FM_DEV int fm_tile_dot(const unsigned char* shown, int row, int col, int begin, int end) {
    constexpr int kParts = 32 / FM_TILE_PART;
    int sum = 0;
    for (int part = begin / FM_TILE_PART; part < end / FM_TILE_PART; part++) {
        const unsigned char* a = shown + (row * kParts + part) * fm_cpu::kSlotBytes;
        const unsigned char* b = shown + (col * kParts + part) * fm_cpu::kSlotBytes + FM_TILE_PART;
        for (int k = 0; k < FM_TILE_PART; k++) sum += int8_t(a[k]) * int8_t(b[k]);
    }
    return sum;
}
FM_DEV void fm_tile_mma_range(fm_tile_c& c, const fm_tile_a& a, const fm_tile_b& b, int begin, int end) {
    struct { fm_tile_a a; fm_tile_b b; } both{a, b};
    const unsigned char* shown = fm_engine->exchange(&both, sizeof(both), fm_cpu::kTile);
    for (int i = 0; i < FM_TILE_REGS; i++) c[i] += fm_tile_dot(shown, fm_tile_row(i), fm_tile_col(i), begin, end);
}
// c += a * b^T over K = 32; all lanes of the wave come here.
FM_DEV void fm_tile_mma(fm_tile_c& c, const fm_tile_a& a, const fm_tile_b& b) { fm_tile_mma_range(c, a, b, 0, 32); }
// The same over the 16 of k from 16 * HALF on.
template <int HALF>
FM_DEV void fm_tile_mma_half(fm_tile_c& c, const fm_tile_a& a, const fm_tile_b& b) {
    fm_tile_mma_range(c, a, b, 16 * HALF, 16 * HALF + 16);
}
#include "half_cpu.h"
