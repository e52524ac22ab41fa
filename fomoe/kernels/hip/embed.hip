// Rows of an embedding matrix as float32, from GGUF blocks as they lie in the file.
//
// TYPE is ggml's number of the type (ggml.h); the formats are those of ggml-common.h and
// ggml-quants.c. Values are those of ggml to the bit.
#include "step.h"

typedef unsigned char byte;

FM_DEV unsigned half_at(const byte* p) { return p[0] | p[1] << 8; }
FM_DEV float scale_at(const byte* p) { return fm_h2f(half_at(p)); }

#if TYPE == 0  // F32
constexpr int kBlock = 1, kBytes = 4;
FM_DEV float value_of(const byte* p, int) { return fm_bits<float>(half_at(p) | half_at(p + 2) << 16); }

#elif TYPE == 1  // F16
constexpr int kBlock = 1, kBytes = 2;
FM_DEV float value_of(const byte* p, int) { return scale_at(p); }

#elif TYPE == 30  // BF16
constexpr int kBlock = 1, kBytes = 2;
FM_DEV float value_of(const byte* p, int) { return fm_bf2f(half_at(p)); }

#elif TYPE == 6  // Q5_0: half d; 32 fifth bits; 16 bytes of nibbles, value i low, i + 16 high
constexpr int kBlock = 32, kBytes = 22;
FM_DEV float value_of(const byte* p, int i) {
  const int nibble = p[6 + i % 16] >> i / 16 * 4 & 15, fifth = p[2 + i / 8] >> i % 8 & 1;
  return scale_at(p) * (float)((nibble | fifth << 4) - 16);
}

#elif TYPE == 8  // Q8_0: half d; 32 int8
constexpr int kBlock = 32, kBytes = 34;
FM_DEV float value_of(const byte* p, int i) { return scale_at(p) * (float)(signed char)p[2 + i]; }

#elif TYPE == 12 || TYPE == 13  // Q4_K, Q5_K: half d, dmin; 12 bytes of scales; [fifth bits]; nibbles
constexpr int kBlock = 256, kHigh = TYPE == 13 ? 32 : 0, kBytes = 144 + kHigh;

// Scale and minimum of group g of 32 values, 6 bits each.
FM_DEV int scale_of(const byte* s, int g) {
  return g < 4 ? s[g] & 63 : (s[g + 4] & 15) | s[g - 4] >> 6 << 4;
}
FM_DEV int minimum_of(const byte* s, int g) {
  return g < 4 ? s[g + 4] & 63 : s[g + 4] >> 4 | s[g] >> 6 << 4;
}
FM_DEV float value_of(const byte* p, int i) {
  const int g = i / 32;
  int q = p[16 + kHigh + g / 2 * 32 + i % 32] >> g % 2 * 4 & 15;
  if (kHigh) q |= (p[16 + i % 32] >> g & 1) << 4;
  const float scale = scale_at(p) * (float)scale_of(p + 4, g);
  const float minimum = scale_at(p + 2) * (float)minimum_of(p + 4, g);
  return scale * (float)q - minimum;  // the product of 17 and 5 bits is exact, fused or not
}

#elif TYPE == 14  // Q6_K: 128 bytes of low nibbles; 64 of top bits; 16 int8 scales; half d
constexpr int kBlock = 256, kBytes = 210;
FM_DEV float value_of(const byte* p, int i) {
  const int half = i / 128, c = i % 128 / 32, j = i % 32;  // group c of a half
  const int low = p[64 * half + c % 2 * 32 + j] >> c / 2 * 4 & 15;
  const int top = p[128 + 32 * half + j] >> 2 * c & 3;
  const float scale = scale_at(p + 208) * (float)(signed char)p[192 + i / 16];
  return scale * (float)((low | top << 4) - 32);
}

#elif TYPE == 23  // IQ4_XS: half d; 16 top bits and 4 bytes of low bits of scales; nibbles
constexpr int kBlock = 256, kBytes = 136;
// kvalues_iq4nl of ggml-common.h plus 128, four to a word.
FM_DEV int level(int nibble) {
  const unsigned levels[4] = {0x3f2d1801u, 0x766a5d4fu, 0xa6998d81u, 0xf1d9c5b5u};
  unsigned word = levels[0];
  for (int i = 1; i < 4; ++i) word = nibble / 4 == i ? levels[i] : word;
  return (int)(word >> nibble % 4 * 8 & 255) - 128;
}
FM_DEV float value_of(const byte* p, int i) {
  const int g = i / 32, j = i % 32;
  const int low = p[4 + g / 2] >> g % 2 * 4 & 15, high = half_at(p + 2) >> 2 * g & 3;
  const int nibble = p[8 + 16 * g + j % 16] >> j / 16 * 4 & 15;
  return scale_at(p) * (float)((low | high << 4) - 32) * (float)level(nibble);
}
#endif

FM_DEV void embed_value(const byte* table, int id, float* x) {
  const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= COLS) return;
  const byte* const block = table + ((long long)id * (COLS / kBlock) + i / kBlock) * kBytes;
  x[i] = value_of(block, i % kBlock);
}

// Row step->token of the table to x [COLS]. A thread has a value.
FM_KERNEL(256)
void embed(const fm_step* step, const byte* table, float* x) {
  fm_release_next();
  embed_value(table, step->token, x);
}

// Rows `ids` [T] to x [T, COLS]. Grid (values, tokens).
FM_KERNEL(256)
void embed_rows(const fm_step* step, const byte* table, const int* ids, float* x) {
  const int t = blockIdx.y;
  if (t < step->tokens) embed_value(table, ids[t], x + (long long)t * COLS);
}
