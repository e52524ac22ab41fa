// GGUF blocks as tiles take them: 32 values at a time become int8 quants and float scales.
// Formats: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml.
#pragma once

enum : int {  // numbers of enum ggml_type
    kF32 = 0, kF16 = 1, kQ5_0 = 6, kQ8_0 = 8, kQ4_K = 12, kQ5_K = 13, kQ6_K = 14, kIQ4_XS = 23, kBF16 = 30
};

// 32 values: `q` packs four int8 a word. With minima value = scale.x * q + scale.y; with halves
// scale.x is that of values 0 to 15, scale.y that of 16 to 31; else value = scale.x * q.
struct Values32 {
    unsigned q[8];
    fm_f2 scale;
};

template <int T>
constexpr bool kHasMinima = T == kQ4_K || T == kQ5_K;
template <int T>
constexpr bool kHasHalves = T == kQ6_K;
template <int T>
constexpr bool kIsFloat = T == kF32 || T == kF16 || T == kBF16;
template <int T>
constexpr int kBlockValues = kIsFloat<T> ? 1 : T == kQ8_0 || T == kQ5_0 ? 32 : 256;

template <int T>
constexpr int kBlockBytes = 0;
template <> constexpr int kBlockBytes<kF32> = 4;
template <> constexpr int kBlockBytes<kF16> = 2;
template <> constexpr int kBlockBytes<kBF16> = 2;
template <> constexpr int kBlockBytes<kQ5_0> = 22;
template <> constexpr int kBlockBytes<kQ8_0> = 34;
template <> constexpr int kBlockBytes<kQ4_K> = 144;
template <> constexpr int kBlockBytes<kQ5_K> = 176;
template <> constexpr int kBlockBytes<kQ6_K> = 210;
template <> constexpr int kBlockBytes<kIQ4_XS> = 136;

// ---- words at addresses of known alignment
typedef const unsigned char* Bytes;

FM_DEV unsigned half_word(Bytes p) { return *reinterpret_cast<const unsigned short*>(p); }
FM_DEV float half_at(Bytes p) { return fm_h2f(half_word(p)); }

template <int ALIGN, int N>
FM_DEV void load_words(Bytes p, unsigned* out) {
    if constexpr (ALIGN >= 16 && N % 4 == 0) {
        FM_UNROLL
        for (int i = 0; i < N; i += 4) {
            const fm_u4 four = *reinterpret_cast<const fm_u4*>(p + 4 * i);
            out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
        }
    } else if constexpr (ALIGN >= 4) {
        FM_UNROLL
        for (int i = 0; i < N; i++) out[i] = *reinterpret_cast<const unsigned*>(p + 4 * i);
    } else {  // even addresses: aligned words, shifted by none or by two bytes
        const unsigned odd = unsigned(reinterpret_cast<unsigned long long>(p)) & 2;
        const unsigned* const words = reinterpret_cast<const unsigned*>(p - odd);
        unsigned low = words[0];
        FM_UNROLL
        for (int i = 0; i < N; i++) {
            // The last one lies beyond the values unless they are shifted.
            const unsigned high = i + 1 < N || odd ? words[i + 1] : 0;
            out[i] = unsigned(((unsigned long long)high << 32 | low) >> (8 * odd));
            low = high;
        }
    }
}

// Four bytes 0 .. 127 a word, `bias` (a multiple of 16, at most 64) less each, as int8.
FM_DEV unsigned less(unsigned bytes, unsigned bias) {
    return ((bytes | 0x80808080u) - bias * 0x01010101u) ^ 0x80808080u;
}
// Bits 0 to 3 moved to bit 4 of bytes 0 to 3.
FM_DEV unsigned fifth_bits(unsigned bits) { return ((bits & 15) * 0x00204081u & 0x01010101u) << 4; }

// The scale and minimum, 6 bits each, of group g of Q4_K and Q5_K; `head` is the block's first 16 bytes.
FM_DEV fm_f2 scale_and_minimum(const unsigned* head, int g) {
    const int shift = 8 * (g & 3);
    const unsigned a = head[1] >> shift, b = head[2] >> shift, c = head[3] >> shift;
    const unsigned scale = g < 4 ? a & 63 : (c & 15) | (a >> 2 & 0x30);
    const unsigned minimum = g < 4 ? b & 63 : (c >> 4 & 15) | (b >> 2 & 0x30);
    const float d = fm_h2f(head[0] & 0xffff), dmin = fm_h2f(head[0] >> 16);
    return fm_f2{d * float(int(scale)), -(dmin * float(int(minimum)))};
}

// ---- group g of 32 values of the 256 (block types) that begin at `p`
template <int T>
struct Kind {};

FM_DEV Values32 unpack(Kind<kQ4_K>, Bytes p, int g) {
    unsigned head[4];
    Values32 v;
    load_words<16, 4>(p, head);
    load_words<16, 8>(p + 16 + 32 * (g / 2), v.q);
    const int shift = 4 * (g & 1);
    FM_UNROLL
    for (int i = 0; i < 8; i++) v.q[i] = v.q[i] >> shift & 0x0f0f0f0fu;
    v.scale = scale_and_minimum(head, g);
    return v;
}

FM_DEV Values32 unpack(Kind<kQ5_K>, Bytes p, int g) {
    unsigned head[4], high[8];
    Values32 v;
    load_words<16, 4>(p, head);
    load_words<16, 8>(p + 16, high);
    load_words<16, 8>(p + 48 + 32 * (g / 2), v.q);
    const int shift = 4 * (g & 1);
    FM_UNROLL
    for (int i = 0; i < 8; i++)
        v.q[i] = (v.q[i] >> shift & 0x0f0f0f0fu) | (high[i] >> g & 0x01010101u) << 4;
    v.scale = scale_and_minimum(head, g);
    return v;
}

FM_DEV Values32 unpack(Kind<kQ6_K>, Bytes p, int g) {
    const int half = g / 4, c = g & 3;
    unsigned high[8];
    Values32 v;
    load_words<2, 8>(p + 64 * half + 32 * (c & 1), v.q);
    load_words<2, 8>(p + 128 + 32 * half, high);
    const int low_shift = 4 * (c / 2), high_shift = 2 * c;
    FM_UNROLL
    for (int i = 0; i < 8; i++) {
        const unsigned top = (high[i] >> high_shift & 0x03030303u) << 4;
        v.q[i] = less((v.q[i] >> low_shift & 0x0f0f0f0fu) | top, 32);
    }
    const unsigned scales = half_word(p + 192 + 2 * g);
    const float d = half_at(p + 208);
    v.scale = fm_f2{d * float((signed char)(scales & 0xff)), d * float((signed char)(scales >> 8))};
    return v;
}

FM_DEV Values32 unpack(Kind<kQ8_0>, Bytes p, int g) {
    Values32 v;
    load_words<2, 8>(p + 34 * g + 2, v.q);
    v.scale = fm_f2{half_at(p + 34 * g), 0.0f};
    return v;
}

FM_DEV Values32 unpack(Kind<kQ5_0>, Bytes p, int g) {
    unsigned high, nibbles[4];
    Values32 v;
    load_words<2, 1>(p + 22 * g + 2, &high);
    load_words<2, 4>(p + 22 * g + 6, nibbles);
    FM_UNROLL
    for (int i = 0; i < 4; i++) {
        v.q[i] = less((nibbles[i] & 0x0f0f0f0fu) | fifth_bits(high >> 4 * i), 16);
        v.q[i + 4] = less((nibbles[i] >> 4 & 0x0f0f0f0fu) | fifth_bits(high >> (4 * i + 16)), 16);
    }
    v.scale = fm_f2{half_at(p + 22 * g), 0.0f};
    return v;
}

FM_DEV Values32 unpack(Kind<kIQ4_XS>, Bytes p, int g) {
    unsigned head[2], nibbles[4];
    Values32 v;
    load_words<8, 2>(p, head);
    load_words<8, 4>(p + 8 + 16 * g, nibbles);
    FM_UNROLL
    for (int i = 0; i < 4; i++)  // the 16 int8 levels: kvalues_iq4nl of ggml-common.h
        fm_levels(nibbles[i], 0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u, v.q[i], v.q[i + 4]);
    const int scale = int(head[1] >> 4 * g & 15) | int(head[0] >> (16 + 2 * g) & 3) << 4;
    v.scale = fm_f2{fm_h2f(head[0] & 0xffff) * float(scale - 32), 0.0f};
    return v;
}
