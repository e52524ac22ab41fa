// How a lane multiplies a piece of a row of weights with activations, for each GGUF type.
//
// Formats: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml; field by field in
// fomoe/kernels/cpu/blocks.h. A *piece* is what a lane takes of a row at a time, kPiece values; it
// needs kRuns *runs* of activations, 16 bytes each: 16 int8 or 4 floats. Weights are read from
// shared memory at `base + at`, where `base` is a multiple of 16 and `at` has the row's alignment.
#pragma once

enum QType { F32 = 0, F16 = 1, Q5_0 = 6, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_XS = 23, BF16 = 30 };

// Activations of a vector in shared memory: runs in the order that `slot` of a format gives, and
// for int8 (d, d * sum) of each 32 values, in their order.
struct Input {
  fm_u4* runs;
  fm_f2* scales;
};

FM_DEV unsigned word_at(const char* base, int at) { return *(const unsigned*)(base + at); }
FM_DEV float half_at(const char* base, int at) {
  return fm_h2f(*(const unsigned short*)(base + at));
}

FM_DEV void unpack(const fm_u4& from, unsigned* to) {
  to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}

// N quads of bytes from a multiple of 16.
template <int N>
FM_DEV void quads_at(const char* base, int at, unsigned* out) {
  FM_UNROLL for (int i = 0; i < N; ++i) unpack(*(const fm_u4*)(base + at + 16 * i), out + 4 * i);
}

// Words from a multiple of 2: `at` as whole words and the bits to shift by.
struct Loose {
  int start, shift;
  FM_DEV Loose(int at) : start(at - at % 4), shift(at % 4 * 8) {}

  // N words from `offset` behind it, a multiple of 4; reads up to 4 bytes beyond them.
  template <int N>
  FM_DEV void read(const char* base, int offset, unsigned* out) const {
    const unsigned* const words = (const unsigned*)(base + start + offset);
    FM_UNROLL for (int i = 0; i < N; ++i)
      out[i] = (unsigned)(((unsigned long long)words[i + 1] << 32 | words[i]) >> shift);
  }
};

FM_DEV int dot4(unsigned weights, unsigned x, int sum) { return fm_dp4a((int)weights, (int)x, sum); }

// Runs of a piece side by side in the vector; lanes of neighbouring pieces read neighbouring runs.
template <int kRuns>
struct Contiguous {
  FM_DEV static int slot(int run, int pieces) { return run % kRuns * pieces + run / kRuns; }
};

// int8 activations of a piece: its runs and the (d, d * sum) of its kScales groups of 32.
template <int kRuns, int kScales>
struct Int8Acts {
  unsigned q[4 * kRuns];
  float d[kScales], sum[kScales];
};

template <int kRuns, int kScales>
FM_DEV Int8Acts<kRuns, kScales> int8_acts(const Input& x, int piece, int pieces, int scale) {
  Int8Acts<kRuns, kScales> a;
  FM_UNROLL for (int j = 0; j < kRuns; ++j) unpack(x.runs[j * pieces + piece], a.q + 4 * j);
  FM_UNROLL for (int j = 0; j < kScales; ++j) {
    const fm_f2 s = x.scales[scale + j];
    a.d[j] = s.x, a.sum[j] = s.y;
  }
  return a;
}

// Values in blocks of 32, a piece each: value = d * q, as Format<T>::dot32 sums it without d.
template <class T, int kBlockBytes>
struct SmallBlocks : Contiguous<2> {
  static constexpr int kBlock = 32, kBytes = kBlockBytes, kPiece = 32, kRuns = 2;
  static constexpr bool kInt8 = true;
  using Acts = Int8Acts<2, 1>;
  FM_DEV static Acts load(const Input& x, int piece, int pieces) {
    return int8_acts<2, 1>(x, piece, pieces, piece);
  }
  FM_DEV static float dot(const char* base, int row, int piece, const Acts& x) {
    const int at = row + piece * kBytes;
    return half_at(base, at) * T::kUnit * (x.d[0] * (float)T::dot32(base, at + 2, x.q));
  }
};

// Values in blocks of 256, a quarter of consecutive ones each piece: two groups of 32.
template <int kBlockBytes>
struct Quarters : Contiguous<4> {
  static constexpr int kBlock = 256, kBytes = kBlockBytes, kPiece = 64, kRuns = 4;
  static constexpr bool kInt8 = true;
  using Acts = Int8Acts<4, 2>;
  FM_DEV static Acts load(const Input& x, int piece, int pieces) {
    return int8_acts<4, 2>(x, piece, pieces, 2 * piece);
  }
};

template <int kType>
struct Format;

template <>
struct Format<Q8_0> : SmallBlocks<Format<Q8_0>, 34> {
  static constexpr float kUnit = 1.0f;
  FM_DEV static int dot32(const char* base, int at, const unsigned* x) {
    unsigned q[8];
    Loose(at).read<8>(base, 0, q);
    int sum = 0;
    FM_UNROLL for (int i = 0; i < 8; ++i) sum = dot4(q[i], x[i], sum);
    return sum;
  }
};

// q - 16 is kept times 8 in a byte: shifted up by 3, and its top bit turned round.
template <>
struct Format<Q5_0> : SmallBlocks<Format<Q5_0>, 22> {
  static constexpr float kUnit = 0.125f;
  // The lowest 4 bits as the top bits of 4 bytes.
  FM_DEV static unsigned fifth(unsigned bits) { return (bits & 15) * 0x10204080u & 0x80808080u; }
  FM_DEV static unsigned byte8(unsigned nibbles, unsigned top) {
    return ((nibbles & 0x78787878u) | top) ^ 0x80808080u;
  }
  FM_DEV static int dot32(const char* base, int at, const unsigned* x) {
    unsigned w[5];  // the fifth bits, 32 nibbles
    Loose(at).read<5>(base, 0, w);
    int sum = 0;
    FM_UNROLL for (int i = 0; i < 4; ++i) {
      sum = dot4(byte8(w[i + 1] << 3, fifth(w[0] >> 4 * i)), x[i], sum);
      sum = dot4(byte8(w[i + 1] >> 1, fifth(w[0] >> (16 + 4 * i))), x[i + 4], sum);
    }
    return sum;
  }
};

// d, dmin and the 6-bit scales and mins of groups 2 c and 2 c + 1 of a block of Q4_K or Q5_K.
struct Affine {
  float d, dmin;
  unsigned scales, mins;  // two bytes each
  FM_DEV Affine(const fm_u4& head, int c) {
    d = fm_h2f(head.x & 0xffff), dmin = fm_h2f(head.x >> 16);
    const int shift = c % 2 * 16;
    const unsigned s = head.y >> shift, m = head.z >> shift, high = head.w >> shift;
    scales = c < 2 ? s & 0x3f3f : (high & 0x0f0f) | (s >> 2 & 0x3030);
    mins = c < 2 ? m & 0x3f3f : (high >> 4 & 0x0f0f) | (m >> 2 & 0x3030);
  }
  FM_DEV int scale(int i) const { return (int)(scales >> 8 * i & 0xff); }
  FM_DEV float min(int i) const { return dmin * (float)(mins >> 8 * i & 0xff); }
  FM_DEV float of(int first, int second, const Int8Acts<4, 2>& x) const {
    const float products = x.d[0] * (float)(scale(0) * first) + x.d[1] * (float)(scale(1) * second);
    return d * products - (min(0) * x.sum[0] + min(1) * x.sum[1]);
  }
};

template <>
struct Format<Q4_K> : Quarters<144> {
  FM_DEV static float dot(const char* base, int row, int piece, const Acts& x) {
    const int at = row + piece / 4 * kBytes, c = piece % 4;
    unsigned q[8];
    quads_at<2>(base, at + 16 + 32 * c, q);
    int first = 0, second = 0;
    FM_UNROLL for (int i = 0; i < 8; ++i) {
      first = dot4(q[i] & 0x0f0f0f0fu, x.q[i], first);
      second = dot4(q[i] >> 4 & 0x0f0f0f0fu, x.q[i + 8], second);
    }
    return Affine(*(const fm_u4*)(base + at), c).of(first, second, x);
  }
};

template <>
struct Format<Q5_K> : Quarters<176> {
  FM_DEV static float dot(const char* base, int row, int piece, const Acts& x) {
    const int at = row + piece / 4 * kBytes, c = piece % 4;
    unsigned q[8], fifth[8];
    quads_at<2>(base, at + 48 + 32 * c, q);
    quads_at<2>(base, at + 16, fifth);
    int first = 0, second = 0;
    FM_UNROLL for (int i = 0; i < 8; ++i) {
      const unsigned bits = fifth[i] >> 2 * c;
      first = dot4((q[i] & 0x0f0f0f0fu) | (bits << 4 & 0x10101010u), x.q[i], first);
      second = dot4((q[i] >> 4 & 0x0f0f0f0fu) | (bits << 3 & 0x10101010u), x.q[i + 8], second);
    }
    return Affine(*(const fm_u4*)(base + at), c).of(first, second, x);
  }
};

template <>
struct Format<IQ4_XS> : Quarters<136> {
  FM_DEV static int dot32(const unsigned* q, const unsigned* x) {
    int sum = 0;
    FM_UNROLL for (int i = 0; i < 4; ++i) {
      unsigned low, high;
      fm_levels(q[i], kLevels[0], kLevels[1], kLevels[2], kLevels[3], low, high);
      sum = dot4(high, x[i + 4], dot4(low, x[i], sum));
    }
    return sum;
  }
  FM_DEV static float dot(const char* base, int row, int piece, const Acts& x) {
    const int at = row + piece / 4 * kBytes, c = piece % 4;
    const unsigned head = word_at(base, at);
    const unsigned low = word_at(base, at + 4) >> 8 * c, high = head >> (16 + 4 * c);
    const int a = (int)((low & 15) | (high & 3) << 4) - 32;
    const int b = (int)((low >> 4 & 15) | (high >> 2 & 3) << 4) - 32;
    unsigned q[8];
    FM_UNROLL for (int i = 0; i < 8; ++i) q[i] = word_at(base, at + 8 + 32 * c + 4 * i);
    const int first = a * dot32(q, x.q), second = b * dot32(q + 4, x.q + 8);
    return fm_h2f(head & 0xffff) * (x.d[0] * (float)first + x.d[1] * (float)second);
  }
  // kvalues_iq4nl of ggml-common.h: 16 int8 levels
  static constexpr unsigned kLevels[4] = {0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u};
};

// Piece 4 b + 2 h + a of Q6_K is of half h of block b: bytes [16 a, 16 a + 16) of each 32 low and
// high bits, so that each bit is read once. They belong to 16 values of each of four groups of 32.
// q - 32 is kept times 4 in a byte: shifted up by 2, and its top bit turned round.
template <>
struct Format<Q6_K> {
  static constexpr int kBlock = 256, kBytes = 210, kPiece = 64, kRuns = 4;
  static constexpr bool kInt8 = true;
  using Acts = Int8Acts<4, 4>;
  FM_DEV static int slot(int run, int pieces) {
    const int block = run / 16, half = run / 8 % 2, group = run / 2 % 4, part = run % 2;
    return group * pieces + 4 * block + 2 * half + part;
  }
  FM_DEV static Acts load(const Input& x, int piece, int pieces) {
    return int8_acts<4, 4>(x, piece, pieces, piece / 2 * 4);
  }
  FM_DEV static unsigned byte4(unsigned low, unsigned high) {
    return ((low & 0x3c3c3c3cu) | (high & 0xc0c0c0c0u)) ^ 0x80808080u;
  }
  FM_DEV static float dot(const char* base, int row, int piece, const Acts& x) {
    const int at = row + piece / 4 * kBytes, half = piece / 2 % 2, part = piece % 2;
    unsigned a[4], b[4], high[4];
    const Loose block(at);
    block.read<4>(base, 64 * half + 16 * part, a);
    block.read<4>(base, 64 * half + 16 * part + 32, b);
    block.read<4>(base, 128 + 32 * half + 16 * part, high);
    int dots[4] = {0, 0, 0, 0};
    FM_UNROLL for (int i = 0; i < 4; ++i) {
      dots[0] = dot4(byte4(a[i] << 2, high[i] << 6), x.q[i], dots[0]);
      dots[1] = dot4(byte4(b[i] << 2, high[i] << 4), x.q[i + 4], dots[1]);
      dots[2] = dot4(byte4(a[i] >> 2, high[i] << 2), x.q[i + 8], dots[2]);
      dots[3] = dot4(byte4(b[i] >> 2, high[i]), x.q[i + 12], dots[3]);
    }
    const signed char* scales = (const signed char*)base + at + 192 + 8 * half + part;
    float sum = 0.0f;
    FM_UNROLL for (int i = 0; i < 4; ++i) sum += x.d[i] * (float)(scales[2 * i] * dots[i]);
    return 0.25f * half_at(base, at + 208) * sum;
  }
};

// Float weights times float activations: 16 bytes of weights are a piece.
template <class T, int kValueBytes>
struct Floats : Contiguous<4 / kValueBytes> {
  static constexpr int kBlock = 1, kBytes = kValueBytes, kPiece = 16 / kValueBytes;
  static constexpr int kRuns = 4 / kValueBytes;
  static constexpr bool kInt8 = false;
  struct Acts { float x[kPiece]; };
  FM_DEV static Acts load(const Input& x, int piece, int pieces) {
    Acts a;
    FM_UNROLL for (int j = 0; j < kRuns; ++j) {
      const fm_f4 v = ((const fm_f4*)x.runs)[j * pieces + piece];
      a.x[4 * j] = v.x, a.x[4 * j + 1] = v.y, a.x[4 * j + 2] = v.z, a.x[4 * j + 3] = v.w;
    }
    return a;
  }
  FM_DEV static float dot(const char* base, int row, int piece, const Acts& x) {
    unsigned w[4];
    quads_at<1>(base, row + 16 * piece, w);
    float sum = 0.0f;
    FM_UNROLL for (int i = 0; i < kPiece; ++i) sum = fm_fma(T::value(w, i), x.x[i], sum);
    return sum;
  }
};
template <>
struct Format<F32> : Floats<Format<F32>, 4> {
  FM_DEV static float value(const unsigned* w, int i) { return fm_bits<float>(w[i]); }
};
template <>
struct Format<F16> : Floats<Format<F16>, 2> {
  FM_DEV static float value(const unsigned* w, int i) { return fm_h2f(w[i / 2] >> i % 2 * 16 & 0xffff); }
};
template <>
struct Format<BF16> : Floats<Format<BF16>, 2> {
  FM_DEV static float value(const unsigned* w, int i) { return fm_bf2f(w[i / 2] >> i % 2 * 16 & 0xffff); }
};
