// ---- matrix tiles of halves: a wave's fragment of [16][32], sums float32 [16][16].
constexpr int FM_HALF_PART = 512 / FM_WAVE;  // halves of a fragment that one lane holds
struct fm_half_tile { uint16_t part[FM_HALF_PART]; };
struct fm_half_c {
    float reg[FM_TILE_REGS];
    float& operator[](int i) { return reg[i]; }
    const float& operator[](int i) const { return reg[i]; }
};
// Rows at multiples of 16 bytes, `stride` bytes apart, in any memory.
FM_DEV fm_half_tile fm_half_load(const void* rows, int stride) {
    fm_check_16(rows);
    if (stride % 16) fm_engine->fail("a tile's stride is no multiple of 16 bytes");
    constexpr int kParts = 32 / FM_HALF_PART;  // lanes that share a row
    fm_half_tile tile;
    const char* row = static_cast<const char*>(rows) + fm_lane() / kParts * int64_t(stride);
    memcpy(tile.part, row + fm_lane() % kParts * sizeof(tile.part), sizeof(tile.part));
    return tile;
}
FM_DEV fm_half_c fm_half_zero() { return fm_half_c{}; }
FM_DEV float fm_half_dot(const unsigned char* shown, int row, int col) {
    constexpr int kParts = 32 / FM_HALF_PART;
    float sum = 0.0f;
    for (int part = 0; part < kParts; part++) {
        const unsigned char* a = shown + (row * kParts + part) * fm_cpu::kSlotBytes;
        const unsigned char* b = shown + (col * kParts + part) * fm_cpu::kSlotBytes + 2 * FM_HALF_PART;
        for (int k = 0; k < FM_HALF_PART; k++) {
            uint16_t x, y;
            memcpy(&x, a + 2 * k, 2);
            memcpy(&y, b + 2 * k, 2);
            sum += fm_h2f(x) * fm_h2f(y);
        }
    }
    return sum;
}
// c += a * b^T over K = 32, registers as fm_tile_row and fm_tile_col say; all lanes come here.
FM_DEV void fm_half_mma(fm_half_c& c, const fm_half_tile& a, const fm_half_tile& b) {
    struct { fm_half_tile a, b; } both{a, b};
    const unsigned char* shown = fm_engine->exchange(&both, sizeof(both), fm_cpu::kTile);
    for (int i = 0; i < FM_TILE_REGS; i++) c[i] += fm_half_dot(shown, fm_tile_row(i), fm_tile_col(i));
}
