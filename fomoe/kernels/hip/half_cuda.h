// ---- matrix tiles of halves: a wave's fragment of [16][32], sums float32 [16][16].
// Layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16". Which k a lane holds is free as long as
// both operands agree: 16 bytes of a row lie in a lane, and a step takes 8 of them.
struct fm_half_tile { unsigned low[4], high[4]; };  // of rows lane / 4 and 8 + lane / 4
struct fm_half_c {
    float reg[FM_TILE_REGS];
    FM_DEV float& operator[](int i) { return reg[i]; }
    FM_DEV const float& operator[](int i) const { return reg[i]; }
};
// Rows at multiples of 16 bytes, `stride` bytes apart, in any memory.
FM_DEV fm_half_tile fm_half_load(const void* rows, int stride) {
    const int lane = fm_lane();
    const char* row = static_cast<const char*>(rows) + (long long)(lane / 4) * stride + lane % 4 * 16;
    const fm_u4 low = fm_load16(row), high = fm_load16(row + 8LL * stride);
    return {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
}
FM_DEV fm_half_c fm_half_zero() { return fm_half_c{}; }
#if __CUDA_ARCH__ >= 800
FM_DEV void fm_half_columns(float* c, const fm_half_tile& a, const unsigned* b) {
    FM_UNROLL
    for (int i = 0; i < 4; i += 2)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a.low[i]), "r"(a.high[i]), "r"(a.low[i + 1]), "r"(a.high[i + 1]), "r"(b[i]), "r"(b[i + 1]));
}
#else
FM_DEV void fm_half_columns(float* c, const fm_half_tile& a, const unsigned* b) {
    FM_UNROLL
    for (int i = 0; i < 4; i++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a.low[i]), "r"(a.high[i]), "r"(b[i]));
}
#endif
// c += a * b^T over K = 32, registers as fm_tile_row and fm_tile_col say; all lanes come here.
FM_DEV void fm_half_mma(fm_half_c& c, const fm_half_tile& a, const fm_half_tile& b) {
    fm_half_columns(c.reg, a, b.low);
    fm_half_columns(c.reg + 4, a, b.high);
}
