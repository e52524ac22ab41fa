// The names of a kernel's world on AMD: RDNA 3 and 4 (FM_WAVE 32), CDNA 3 (FM_WAVE 64). Built by
// hiprtc, or by a bare clang without ROCm. Only compiler builtins are used; __gfx1200__ and its like
// name the target.
#pragma once

#if FM_WAVE != 32 && FM_WAVE != 64
#error FM_WAVE is 32 or 64
#endif

// ---- declarations
#if !defined(__HIPCC_RTC__)  // hiprtc declares these by itself
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(n) __attribute__((amdgpu_flat_work_group_size(1, n)))
#define FM_INDEX(name, of_x, of_y, of_z)                                                 \
    struct name {                                                                        \
        struct X { __device__ operator unsigned() const { return of_x; } } x;            \
        struct Y { __device__ operator unsigned() const { return of_y; } } y;            \
        struct Z { __device__ operator unsigned() const { return of_z; } } z;            \
    }
FM_INDEX(fm_thread_index, __builtin_amdgcn_workitem_id_x(), __builtin_amdgcn_workitem_id_y(),
         __builtin_amdgcn_workitem_id_z());
FM_INDEX(fm_group_index, __builtin_amdgcn_workgroup_id_x(), __builtin_amdgcn_workgroup_id_y(),
         __builtin_amdgcn_workgroup_id_z());
FM_INDEX(fm_group_size, __builtin_amdgcn_workgroup_size_x(), __builtin_amdgcn_workgroup_size_y(),
         __builtin_amdgcn_workgroup_size_z());
FM_INDEX(fm_grid_size, __builtin_amdgcn_grid_size_x() / __builtin_amdgcn_workgroup_size_x(),
         __builtin_amdgcn_grid_size_y() / __builtin_amdgcn_workgroup_size_y(),
         __builtin_amdgcn_grid_size_z() / __builtin_amdgcn_workgroup_size_z());
static const __device__ fm_thread_index threadIdx{};
static const __device__ fm_group_index blockIdx{};
static const __device__ fm_group_size blockDim{};
static const __device__ fm_grid_size gridDim{};
#endif

#define FM_KERNEL(max_threads) extern "C" __global__ __launch_bounds__(max_threads)
#define FM_DEV __device__ __forceinline__
#define FM_SHARED static __shared__ __attribute__((aligned(16)))
#define FM_DYN_SHARED(T, name)                                                  \
    extern __shared__ __attribute__((aligned(16))) unsigned char fm_dynamic[]; \
    T* name = reinterpret_cast<T*>(fm_dynamic)
#define FM_UNROLL _Pragma("unroll")
#define FM_NO_UNROLL _Pragma("unroll 1")

struct alignas(16) fm_u4 { unsigned x, y, z, w; };
struct alignas(16) fm_f4 { float x, y, z, w; };
struct alignas(8) fm_u2 { unsigned x, y; };
struct alignas(8) fm_f2 { float x, y; };

// ---- numbers
template <class To, class From>
FM_DEV To fm_bits(From from) {
    return __builtin_bit_cast(To, from);
}
FM_DEV float fm_h2f(unsigned bits) { return float(fm_bits<_Float16>((unsigned short)bits)); }
FM_DEV unsigned fm_f2h(float value) { return fm_bits<unsigned short>(_Float16(value)); }
FM_DEV float fm_bf2f(unsigned bits) { return fm_bits<float>(bits << 16); }
FM_DEV float fm_exp(float x) { return __builtin_expf(x); }
FM_DEV float fm_log(float x) { return __builtin_logf(x); }
FM_DEV float fm_sqrt(float x) { return __builtin_sqrtf(x); }
FM_DEV float fm_rint(float x) { return __builtin_rintf(x); }
FM_DEV float fm_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FM_DEV float fm_abs(float x) { return __builtin_fabsf(x); }
FM_DEV float fm_max(float a, float b) { return __builtin_fmaxf(a, b); }
FM_DEV float fm_min(float a, float b) { return __builtin_fminf(a, b); }
FM_DEV int fm_dp4a(int a, int b, int c) {
#if defined(__GFX11__) || defined(__GFX12__)
    return __builtin_amdgcn_sudot4(true, a, true, b, c, false);
#else
    return __builtin_amdgcn_sdot4(a, b, c, false);
#endif
}
#include "trig.h"

// The bytes of a table of 16 that the low and the high nibbles of q's bytes choose.
FM_DEV unsigned fm_level_bytes(unsigned nibbles, unsigned t0, unsigned t1, unsigned t2, unsigned t3) {
    const unsigned place = nibbles & 0x07070707u, upper = (nibbles >> 3 & 0x01010101u) * 0xffu;
    const unsigned a = __builtin_amdgcn_perm(t1, t0, place), b = __builtin_amdgcn_perm(t3, t2, place);
    return (a & ~upper) | (b & upper);
}
FM_DEV void fm_levels(unsigned q, unsigned t0, unsigned t1, unsigned t2, unsigned t3, unsigned& low, unsigned& high) {
    low = fm_level_bytes(q & 0x0f0f0f0fu, t0, t1, t2, t3);
    high = fm_level_bytes(q >> 4 & 0x0f0f0f0fu, t0, t1, t2, t3);
}

// ---- memory
typedef unsigned fm_vector4 __attribute__((ext_vector_type(4)));
FM_DEV fm_u4 fm_load16(const void* p) { return fm_bits<fm_u4>(*static_cast<const fm_vector4*>(p)); }
FM_DEV void fm_copy16(void* shared, const void* global) {
    *static_cast<fm_vector4*>(shared) = *static_cast<const fm_vector4*>(global);
}
FM_DEV void fm_copy_commit() {}
template <int N>
FM_DEV void fm_copy_wait() {}
FM_DEV void fm_fence() { __builtin_amdgcn_fence(__ATOMIC_SEQ_CST, "agent"); }
FM_DEV unsigned fm_atomic_add(unsigned* p, unsigned value) {
    return __hip_atomic_fetch_add(p, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
FM_DEV unsigned long long fm_clock() { return __builtin_readsteadycounter(); }  // at 100 MHz

// ---- launches: one begins when the one before has ended
FM_DEV void fm_wait_before() {}
FM_DEV void fm_release_next() {}

// ---- groups and waves
// Orders shared memory alone: the caches of global memory stay as they are, unlike with
// __syncthreads().
FM_DEV void fm_barrier() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup", "local");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup", "local");
}
FM_DEV int fm_thread() { return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)); }
FM_DEV int fm_lane() {
    const unsigned low = __builtin_amdgcn_mbcnt_lo(~0u, 0u);
    return int(FM_WAVE == 32 ? low : __builtin_amdgcn_mbcnt_hi(~0u, low));
}

// A lane's value from another lane, in registers where the target has a way. CONTROL: DPP_CTRL of
// the ISA guides; 0x160 + m is row_xmask (RDNA), the low 8 bits alone a permutation of each quad.
template <int CONTROL>
FM_DEV int fm_dpp(int value) {
    return __builtin_amdgcn_mov_dpp(value, CONTROL, 0xf, 0xf, true);
}
FM_DEV int fm_any_lane(int value, int lane) { return __builtin_amdgcn_ds_bpermute(lane << 2, value); }
template <int MASK>
FM_DEV int fm_xor_lane(int value) {
#if FM_WAVE == 32
    if constexpr (MASK < 16) return fm_dpp<0x160 + MASK>(value);
    if constexpr (MASK == 16)
        return __builtin_amdgcn_permlanex16(value, value, 0x76543210, 0xfedcba98, false, false);
#else
    if constexpr (MASK == 1) return fm_dpp<0xb1>(value);
    if constexpr (MASK == 2) return fm_dpp<0x4e>(value);
    if constexpr (MASK < 32) return __builtin_amdgcn_ds_swizzle(value, MASK << 10 | 0x1f);
#endif
    return fm_any_lane(value, fm_lane() ^ MASK);
}
template <class T>
FM_DEV T fm_wave_xor(T value, int mask) {
    const int bits = fm_bits<int>(value);
    switch (mask) {  // known when the kernel is compiled, as a rule
        case 1: return fm_bits<T>(fm_xor_lane<1>(bits));
        case 2: return fm_bits<T>(fm_xor_lane<2>(bits));
        case 4: return fm_bits<T>(fm_xor_lane<4>(bits));
        case 8: return fm_bits<T>(fm_xor_lane<8>(bits));
        case 16: return fm_bits<T>(fm_xor_lane<16>(bits));
        case 32: return fm_bits<T>(fm_xor_lane<32>(bits));
        default: return fm_bits<T>(fm_any_lane(bits, fm_lane() ^ mask));
    }
}
// The value of the wave's first lane in all of them, which the compiler then keeps once for the wave.
FM_DEV int fm_uniform(int value) { return __builtin_amdgcn_readfirstlane(value); }
// Orders what the lanes of a wave wrote to shared memory, and what came there by fm_copy16.
FM_DEV void fm_wave_sync() {
    __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront", "local");
    __builtin_amdgcn_wave_barrier();
}
FM_DEV float fm_wave_sum(float value) {
    FM_UNROLL
    for (int mask = 1; mask < FM_WAVE; mask *= 2) value += fm_wave_xor(value, mask);
    return value;
}
FM_DEV float fm_wave_max(float value) {
    FM_UNROLL
    for (int mask = 1; mask < FM_WAVE; mask *= 2) value = fm_max(value, fm_wave_xor(value, mask));
    return value;
}

// ---- matrix tiles: a wave's fragments of int8 [16][32] and its share of int32 [16][16].
// Layouts: the "Matrix instructions" chapters of AMD's ISA guides. A lane holds bytes of row
// lane % 16 of a, and of b alike; which k they are is free as long as both agree.
#if defined(__GFX11__) || defined(__GFX12__) || defined(__gfx942__)
typedef int fm_vector_c __attribute__((ext_vector_type(256 / FM_WAVE)));
constexpr int FM_TILE_REGS = 256 / FM_WAVE;
#if defined(__GFX11__)
constexpr int FM_TILE_PART = 32;  // bytes of a lane; both halves of the wave hold the same
#else
constexpr int FM_TILE_PART = 512 / FM_WAVE;
#endif
struct fm_tile_part { int word[FM_TILE_PART / 4]; };
struct fm_tile_a { fm_tile_part part; };
struct fm_tile_b { fm_tile_part part; };
struct fm_tile_c {
    int reg[FM_TILE_REGS];
    __device__ __forceinline__ int& operator[](int i) { return reg[i]; }
    __device__ __forceinline__ const int& operator[](int i) const { return reg[i]; }
};
// The lanes of 16 rows together hold k 0 to 15 in their first halves, where there are two.
FM_DEV fm_tile_part fm_tile_read(const signed char* shared, int stride) {
    const int lane = fm_lane();
    const signed char* row = shared + lane % 16 * stride;
    fm_tile_part part;
#if defined(__GFX11__)
    __builtin_memcpy(&part, __builtin_assume_aligned(row, 16), sizeof(part));
#else
    row += lane / 16 * 8;
    for (int i = 0; i < FM_TILE_PART / 8; i++)
        __builtin_memcpy(part.word + 2 * i, __builtin_assume_aligned(row + 16 * i, 8), 8);
#endif
    return part;
}
FM_DEV fm_tile_a fm_tile_load_a(const signed char* shared, int stride) { return {fm_tile_read(shared, stride)}; }
FM_DEV fm_tile_b fm_tile_load_b(const signed char* shared, int stride) { return {fm_tile_read(shared, stride)}; }
FM_DEV fm_tile_c fm_tile_zero() { return fm_tile_c{}; }
FM_DEV int fm_tile_col(int) { return fm_lane() % 16; }
#endif

#if defined(__GFX11__)
typedef int fm_vector_k16 __attribute__((ext_vector_type(4)));
FM_DEV int fm_tile_row(int i) { return 2 * i + fm_lane() / 16; }
FM_DEV fm_vector_c fm_tile_step(fm_vector_c c, const int* a, const int* b) {
    const fm_vector_k16 va = {a[0], a[1], a[2], a[3]}, vb = {b[0], b[1], b[2], b[3]};
    return __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(true, va, true, vb, c, false);
}
constexpr int FM_TILE_STEP = 4;  // words of k 16
#elif defined(__GFX12__)
typedef int fm_vector_k16 __attribute__((ext_vector_type(2)));
FM_DEV int fm_tile_row(int i) { return i + 8 * (fm_lane() / 16); }
FM_DEV fm_vector_c fm_tile_step(fm_vector_c c, const int* a, const int* b) {
    const fm_vector_k16 va = {a[0], a[1]}, vb = {b[0], b[1]};
    return __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32_gfx12(true, va, true, vb, c, false);
}
constexpr int FM_TILE_STEP = 2;
#elif defined(__gfx942__)
FM_DEV int fm_tile_row(int i) { return 4 * (fm_lane() / 16) + i; }
#endif

// c += a * b^T over K = 32; all lanes of the wave come here.
#if defined(__GFX11__) || defined(__GFX12__)
FM_DEV void fm_tile_mma(fm_tile_c& c, const fm_tile_a& a, const fm_tile_b& b) {
    fm_vector_c sum = fm_bits<fm_vector_c>(c);
    sum = fm_tile_step(sum, a.part.word, b.part.word);
    sum = fm_tile_step(sum, a.part.word + FM_TILE_STEP, b.part.word + FM_TILE_STEP);
    c = fm_bits<fm_tile_c>(sum);
}
// The same over the 16 of k from 16 * HALF on.
template <int HALF>
FM_DEV void fm_tile_mma_half(fm_tile_c& c, const fm_tile_a& a, const fm_tile_b& b) {
    constexpr int kWord = HALF * FM_TILE_STEP;
    c = fm_bits<fm_tile_c>(fm_tile_step(fm_bits<fm_vector_c>(c), a.part.word + kWord, b.part.word + kWord));
}
#elif defined(__gfx942__)
FM_DEV void fm_tile_mma(fm_tile_c& c, const fm_tile_a& a, const fm_tile_b& b) {
    const long va = fm_bits<long>(a.part), vb = fm_bits<long>(b.part);
    c = fm_bits<fm_tile_c>(__builtin_amdgcn_mfma_i32_16x16x32_i8(va, vb, fm_bits<fm_vector_c>(c), 0, 0, 0));
}
// The same over the 16 of k from 16 * HALF on, which half of the lanes hold.
template <int HALF>
FM_DEV void fm_tile_mma_half(fm_tile_c& c, const fm_tile_a& a, const fm_tile_b& b) {
    const fm_tile_a nothing = {};
    fm_tile_mma(c, fm_lane() / 32 == HALF ? a : nothing, b);
}
#endif
#include "half_amd.h"
