// The names of a kernel's world on NVIDIA, sm_75 and newer. Built by NVRTC, without CUDA's headers.
#pragma once

#if FM_WAVE != 32
#error FM_WAVE is 32 on this device
#endif

// ---- declarations
#define FM_KERNEL(max_threads) extern "C" __global__ __launch_bounds__(max_threads)
#define FM_DEV __device__ __forceinline__
#define FM_SHARED static __shared__ __align__(16)
#define FM_DYN_SHARED(T, name)                                   \
    extern __shared__ __align__(16) unsigned char fm_dynamic[]; \
    T* name = reinterpret_cast<T*>(fm_dynamic)
#define FM_UNROLL _Pragma("unroll")
#define FM_NO_UNROLL _Pragma("unroll 1")

typedef uint4 fm_u4;
typedef float4 fm_f4;
typedef uint2 fm_u2;
typedef float2 fm_f2;

// ---- numbers
template <class To, class From>
FM_DEV To fm_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    union { From from; To to; } both{from};
    return both.to;
}
FM_DEV float fm_h2f(unsigned bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)bits));
    return value;
}
FM_DEV unsigned fm_f2h(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
FM_DEV float fm_bf2f(unsigned bits) { return __uint_as_float(bits << 16); }
FM_DEV float fm_exp(float x) { return expf(x); }
FM_DEV float fm_log(float x) { return logf(x); }
FM_DEV float fm_sqrt(float x) { return sqrtf(x); }
FM_DEV float fm_rint(float x) { return rintf(x); }
FM_DEV float fm_fma(float a, float b, float c) { return fmaf(a, b, c); }
FM_DEV float fm_abs(float x) { return fabsf(x); }
FM_DEV float fm_max(float a, float b) { return fmaxf(a, b); }
FM_DEV float fm_min(float a, float b) { return fminf(a, b); }
FM_DEV int fm_dp4a(int a, int b, int c) { return __dp4a(a, b, c); }
#include "trig.h"

// The bytes of a table of 16 that the low and the high nibbles of q's bytes choose. A selector's top
// bit means something else to __byte_perm, so each half of the table is asked with the lower three.
FM_DEV void fm_levels(unsigned q, unsigned t0, unsigned t1, unsigned t2, unsigned t3, unsigned& low, unsigned& high) {
    const unsigned place = q & 0x77777777u, half = 0x32103210u | (q & 0x88888888u) >> 1;
    const unsigned first = __byte_perm(__byte_perm(t0, t1, place), __byte_perm(t2, t3, place), half);
    const unsigned second =
        __byte_perm(__byte_perm(t0, t1, place >> 16), __byte_perm(t2, t3, place >> 16), half >> 16);
    low = __byte_perm(first, second, 0x6420);
    high = __byte_perm(first, second, 0x7531);
}

// ---- memory
FM_DEV fm_u4 fm_load16(const void* p) { return *static_cast<const fm_u4*>(p); }
FM_DEV unsigned fm_shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }
#if __CUDA_ARCH__ >= 800
FM_DEV void fm_copy16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(fm_shared_address(shared)), "l"(global)
                 : "memory");
}
FM_DEV void fm_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
FM_DEV void fm_copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#else
FM_DEV void fm_copy16(void* shared, const void* global) { *static_cast<fm_u4*>(shared) = fm_load16(global); }
FM_DEV void fm_copy_commit() {}
template <int N>
FM_DEV void fm_copy_wait() {}
#endif
FM_DEV void fm_fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
FM_DEV unsigned fm_atomic_add(unsigned* p, unsigned value) { return atomicAdd(p, value); }
FM_DEV unsigned long long fm_clock() {  // nanoseconds
    unsigned long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

// ---- launches: fm_release_next lets the next one of the stream start beside this one, as far as it
// gets before its fm_wait_before, which waits until the one before has ended. Launch.early asks for it.
#if __CUDA_ARCH__ >= 900
FM_DEV void fm_wait_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
FM_DEV void fm_release_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
FM_DEV void fm_wait_before() {}
FM_DEV void fm_release_next() {}
#endif

// ---- groups and waves
FM_DEV void fm_barrier() { __syncthreads(); }
FM_DEV int fm_thread() { return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)); }
FM_DEV int fm_lane() {
    unsigned lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    return int(lane);
}
template <class T>
FM_DEV T fm_wave_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
// The value of the wave's first lane in all of them, which the compiler then keeps once for the wave.
FM_DEV int fm_uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }
// Orders what the lanes of a wave wrote to shared memory, and what came there by fm_copy16.
FM_DEV void fm_wave_sync() { __syncwarp(); }
FM_DEV float fm_wave_sum(float value) {
    FM_UNROLL
    for (int mask = 1; mask < FM_WAVE; mask *= 2) value += fm_wave_xor(value, mask);
    return value;
}
FM_DEV float fm_wave_max(float value) {
    FM_UNROLL
    for (int mask = 1; mask < FM_WAVE; mask *= 2) value = fmaxf(value, fm_wave_xor(value, mask));
    return value;
}

// ---- matrix tiles: a wave's fragments of int8 [16][32] and its share of int32 [16][16].
// Layouts: PTX ISA, "Matrix Fragments for mma.m16n8k32"; a column half of c is four registers.
constexpr int FM_TILE_REGS = 8;
struct fm_tile_a { unsigned part[4]; };  // rows 0-7 and 8-15 of k 0-15, then of k 16-31
struct fm_tile_b { unsigned part[4]; };  // k 0-15 and 16-31 of columns 0-7, then of 8-15
struct fm_tile_c {
    int reg[FM_TILE_REGS];
    __device__ __forceinline__ int& operator[](int i) { return reg[i]; }
    __device__ __forceinline__ const int& operator[](int i) const { return reg[i]; }
};
// Four 8 x 16-byte matrices at once: lane l gives the row of one, and gets 4 bytes of each.
FM_DEV void fm_tile_read(unsigned (&part)[4], const signed char* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
                 : "r"(fm_shared_address(row))
                 : "memory");
}
FM_DEV fm_tile_a fm_tile_load_a(const signed char* shared, int stride) {
    const int lane = fm_lane();
    fm_tile_a a;
    fm_tile_read(a.part, shared + lane % 16 * stride + lane / 16 * 16);
    return a;
}
FM_DEV fm_tile_b fm_tile_load_b(const signed char* shared, int stride) {
    const int lane = fm_lane();
    fm_tile_b b;
    fm_tile_read(b.part, shared + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 16);
    return b;
}
FM_DEV fm_tile_c fm_tile_zero() { return fm_tile_c{}; }
FM_DEV int fm_tile_row(int i) { return fm_lane() / 4 + 8 * (i / 2 % 2); }
FM_DEV int fm_tile_col(int i) { return fm_lane() % 4 * 2 + i % 2 + 8 * (i / 4); }
#if __CUDA_ARCH__ >= 800
FM_DEV void fm_tile_half(int* c, const fm_tile_a& a, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "r"(b0), "r"(b1));
}
FM_DEV void fm_tile_half_k16(int* c, unsigned a0, unsigned a1, unsigned b) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}
#else
// sm_75 has the quarter of it: 8 rows and k 16.
FM_DEV void fm_tile_quarter(int* c, unsigned a, unsigned b) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(c[0]), "+r"(c[1])
        : "r"(a), "r"(b));
}
FM_DEV void fm_tile_half_k16(int* c, unsigned a0, unsigned a1, unsigned b) {
    fm_tile_quarter(c, a0, b);
    fm_tile_quarter(c + 2, a1, b);
}
FM_DEV void fm_tile_half(int* c, const fm_tile_a& a, unsigned b0, unsigned b1) {
    fm_tile_half_k16(c, a.part[0], a.part[1], b0);
    fm_tile_half_k16(c, a.part[2], a.part[3], b1);
}
#endif
// c += a * b^T over K = 32; all lanes of the wave come here.
FM_DEV void fm_tile_mma(fm_tile_c& c, const fm_tile_a& a, const fm_tile_b& b) {
    fm_tile_half(c.reg, a, b.part[0], b.part[1]);
    fm_tile_half(c.reg + 4, a, b.part[2], b.part[3]);
}
// The same over the 16 of k from 16 * HALF on.
template <int HALF>
FM_DEV void fm_tile_mma_half(fm_tile_c& c, const fm_tile_a& a, const fm_tile_b& b) {
    fm_tile_half_k16(c.reg, a.part[2 * HALF], a.part[2 * HALF + 1], b.part[HALF]);
    fm_tile_half_k16(c.reg + 4, a.part[2 * HALF], a.part[2 * HALF + 1], b.part[2 + HALF]);
}
#include "half_cuda.h"
