// ---- matrix tiles of halves: a wave's fragment of [16][32], sums float32 [16][16].
// Layouts: the "Matrix instructions" chapters of AMD's ISA guides. A lane holds halves of row
// lane % 16; which k they are is free as long as both operands agree.
#if defined(__GFX11__) || defined(__GFX12__) || defined(__gfx942__)
#if defined(__GFX11__)
constexpr int FM_HALF_PART = 64;  // bytes of a lane; both halves of the wave hold the same
constexpr int FM_HALF_STEP = 16;  // halves that an instruction takes of a lane
#elif defined(__GFX12__)
constexpr int FM_HALF_PART = 32, FM_HALF_STEP = 8;
#else
constexpr int FM_HALF_PART = 16, FM_HALF_STEP = 4;
#endif
typedef _Float16 fm_half_step __attribute__((ext_vector_type(FM_HALF_STEP)));
typedef float fm_half_sums __attribute__((ext_vector_type(FM_TILE_REGS)));

struct fm_half_tile { fm_half_step step[FM_HALF_PART / 2 / FM_HALF_STEP]; };
struct fm_half_c {
    float reg[FM_TILE_REGS];
    FM_DEV float& operator[](int i) { return reg[i]; }
    FM_DEV const float& operator[](int i) const { return reg[i]; }
};
// Rows at multiples of 16 bytes, `stride` bytes apart, in any memory.
FM_DEV fm_half_tile fm_half_load(const void* rows, int stride) {
    const int lane = fm_lane();
    const char* row = static_cast<const char*>(rows) + (long long)(lane % 16) * stride;
#if !defined(__GFX11__)
    row += lane / 16 * FM_HALF_PART;
#endif
    fm_half_tile tile;
    __builtin_memcpy(&tile, __builtin_assume_aligned(row, 16), sizeof(tile));
    return tile;
}
FM_DEV fm_half_c fm_half_zero() { return fm_half_c{}; }
FM_DEV fm_half_sums fm_half_take(fm_half_sums c, fm_half_step a, fm_half_step b) {
#if defined(__GFX11__)
    return __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(a, b, c);
#elif defined(__GFX12__)
    return __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(a, b, c);
#else
    return __builtin_amdgcn_mfma_f32_16x16x16f16(a, b, c, 0, 0, 0);
#endif
}
// c += a * b^T over K = 32, registers as fm_tile_row and fm_tile_col say; all lanes come here.
FM_DEV void fm_half_mma(fm_half_c& c, const fm_half_tile& a, const fm_half_tile& b) {
    fm_half_sums sums = fm_bits<fm_half_sums>(c);
    sums = fm_half_take(sums, a.step[0], b.step[0]);
    sums = fm_half_take(sums, a.step[1], b.step[1]);
    c = fm_bits<fm_half_c>(sums);
}
#endif
