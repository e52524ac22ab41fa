// Products of weight rows with activations, for every weight type.
//
// One order for each output: chunks of 256 values in turn, groups of 32 within a chunk in turn, eight
// float lanes side by side (lane j takes values 4 j .. 4 j + 3 of each group of the integer kernel),
// one tree over the lanes at the end. Tokens are taken several at a time only to unpack a row once.
#pragma once

#include "table.h"
#include "unpack.h"

namespace fomoe::cpu::FOMOE_ISA {

constexpr int kTokens = 4;  // tokens that share a pass over an unpacked row

// The scale of one group of 32 in the lanes of its products.
template <class T>
inline F8 group_scale(const Chunk& c, int g) {
    if constexpr (T::group == 32) return splat(c.scale[g]);
    return splat2(c.scale[2 * g], c.scale[2 * g + 1]);
}

template <class T>
inline I8 product(B32 w, B32 x) {
    if constexpr (T::is_signed) return dot_signed(w, x);
    return dot_unsigned(w, x);
}

// Running sums of N tokens for one row.
template <class T, int N>
struct Accumulator {
    F8 products[N];
    F8 offsets[N];  // used where the type has offsets

    Accumulator() {
        for (int t = 0; t < N; ++t) products[t] = offsets[t] = zero();
    }

    // `first` is the number of the chunk's first group of 32 in the row.
    inline __attribute__((always_inline)) void take(const Chunk& c, int groups, int64_t first,
                                                    const QuantizedRows& x, const int64_t* token) {
#pragma GCC unroll 8
        for (int g = 0; g < groups; ++g) {
            const F8 scale = group_scale<T>(c, g);
            for (int t = 0; t < N; ++t) {
                const B32 q = bytes(x.q + token[t] * x.cols + 32 * (first + g));
                const F8 both = mul(scale, splat(x.scale[token[t] * x.scale_stride + first + g]));
                products[t] = fma(to_float(product<T>(c.q[g], q)), both, products[t]);
            }
        }
        if constexpr (T::has_offset) {
            constexpr int vectors = 32 / T::group;  // of 8 offsets in a chunk
            for (int t = 0; t < N; ++t)
                for (int i = 0; i < vectors; ++i) {
                    const float* sums = x.sums + token[t] * x.sums_stride + vectors * first + 8 * i;
                    offsets[t] = fma(load(c.offset + 8 * i), load(sums), offsets[t]);
                }
        }
    }

    float total(int t) const {
        if constexpr (T::has_offset) return sum(add(products[t], offsets[t]));
        return sum(products[t]);
    }
};

template <class T>
inline void unpack_at(const uint8_t* row, int64_t chunk, int groups, Chunk& c) {
    if constexpr (T::has_offset && T::elements == 32)
        if (groups < kGroups) store(c.offset, zero());
    T::unpack(row + chunk * (kChunk / T::elements) * T::block_bytes, groups, c);
}

inline int64_t token_of(const Slice& s, int64_t j) { return s.tokens ? s.tokens[j] : j; }

// Tokens [j, j + N) of the slice against one row, chunk by chunk from `source(i, groups)`.
template <class T, int N, class Source>
inline __attribute__((always_inline)) void dot_tokens(const Slice& s, const QuantizedRows& x,
                                                      int64_t row, int64_t j, Source source) {
    int64_t token[N];
    for (int t = 0; t < N; ++t) token[t] = token_of(s, j + t);
    Accumulator<T, N> acc;
    const int64_t whole = x.cols / kChunk;
    const int rest = static_cast<int>(x.cols % kChunk) / 32;
    for (int64_t i = 0; i < whole; ++i) acc.take(source(i, kGroups), kGroups, 8 * i, x, token);
    if (rest) acc.take(source(whole, rest), rest, 8 * whole, x, token);
    for (int t = 0; t < N; ++t) s.out[(j + t) * s.out_stride + row] = acc.total(t);
}

template <class T>
void dot_q8(const Slice& s, const QuantizedRows& x, void* scratch) {
    Chunk* unpacked = static_cast<Chunk*>(scratch);
    for (int64_t row = s.begin; row < s.end; ++row) {
        const uint8_t* w = s.weights + row * s.row_bytes;
        if (s.count == 1) {
            Chunk c;
            dot_tokens<T, 1>(s, x, row, 0, [&](int64_t i, int groups) -> const Chunk& {
                unpack_at<T>(w, i, groups, c);
                return c;
            });
            continue;
        }
        const int64_t whole = x.cols / kChunk;
        for (int64_t i = 0; i < whole; ++i) unpack_at<T>(w, i, kGroups, unpacked[i]);
        const int rest = static_cast<int>(x.cols % kChunk) / 32;
        if (rest) unpack_at<T>(w, whole, rest, unpacked[whole]);
        const auto stored = [&](int64_t i, int) -> const Chunk& { return unpacked[i]; };
        int64_t j = 0;
        for (; j + kTokens <= s.count; j += kTokens) dot_tokens<T, kTokens>(s, x, row, j, stored);
        for (; j < s.count; ++j) dot_tokens<T, 1>(s, x, row, j, stored);
    }
}

template <class T>
void dequantize(const uint8_t* row, int64_t cols, float* out) {
    constexpr int per_scale = T::group / 8;
    for (int64_t i = 0; i * kChunk < cols; ++i, out += kChunk) {
        const int64_t left = cols - i * kChunk;
        const int groups = static_cast<int>(left < kChunk ? left / 32 : kGroups);
        Chunk c;
        unpack_at<T>(row, i, groups, c);
        alignas(32) int8_t q[kChunk];
        for (int g = 0; g < groups; ++g) store_bytes(q + 32 * g, c.q[g]);
        for (int v = 0; v < 4 * groups; ++v) {
            const F8 value = mul(splat(c.scale[v / per_scale]), from_int8(word64(q + 8 * v)));
            if constexpr (T::has_offset) store(out + 8 * v, add(value, splat(c.offset[v / per_scale])));
            else store(out + 8 * v, value);
        }
    }
}

// The float types: F8 load of 8 values and the value of one.
struct F32 {
    static F8 eight(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
    static constexpr int size = 4;
};
struct F16 {
    static F8 eight(const uint8_t* p) { return load_f16(reinterpret_cast<const uint16_t*>(p)); }
    static constexpr int size = 2;
};
struct BF16 {
    static F8 eight(const uint8_t* p) { return load_bf16(reinterpret_cast<const uint16_t*>(p)); }
    static constexpr int size = 2;
};

template <class T>
void convert(const uint8_t* row, int64_t cols, float* out) {
    int64_t i = 0;
    for (; i + 8 <= cols; i += 8) store(out + i, T::eight(row + i * T::size));
    if (i == cols) return;
    uint8_t tail[32] = {};
    std::memcpy(tail, row + i * T::size, static_cast<size_t>(cols - i) * T::size);
    store_n(out + i, T::eight(tail), static_cast<int>(cols - i));
}

// N tokens against one float row: lane j of sum v takes the values 32 i + 8 v + j.
template <int N>
inline void dot_floats(const Slice& s, const float* w, const float* x, int64_t cols, int64_t row,
                       int64_t j) {
    const float* at[N];
    F8 acc[N][4];
    for (int t = 0; t < N; ++t) {
        at[t] = x + token_of(s, j + t) * cols;
        for (F8& a : acc[t]) a = zero();
    }
    int64_t i = 0;
    for (; i + 32 <= cols; i += 32)
        for (int v = 0; v < 4; ++v) {
            const F8 values = load(w + i + 8 * v);
            for (int t = 0; t < N; ++t) acc[t][v] = fma(values, load(at[t] + i + 8 * v), acc[t][v]);
        }
    for (int v = 0; i < cols; i += 8, ++v) {
        const int n = static_cast<int>(cols - i < 8 ? cols - i : 8);
        const F8 values = load_n(w + i, n);
        for (int t = 0; t < N; ++t) acc[t][v] = fma(values, load_n(at[t] + i, n), acc[t][v]);
    }
    for (int t = 0; t < N; ++t)
        s.out[(j + t) * s.out_stride + row] =
            sum(add(add(acc[t][0], acc[t][1]), add(acc[t][2], acc[t][3])));
}

// `Row` unpacks a row to float32 in scratch.
template <DequantizeRow Row>
void dot_f32(const Slice& s, const float* x, int64_t cols, void* scratch) {
    float* w = static_cast<float*>(scratch);
    for (int64_t row = s.begin; row < s.end; ++row) {
        Row(s.weights + row * s.row_bytes, cols, w);
        int64_t j = 0;
        for (; j + 3 <= s.count; j += 3) dot_floats<3>(s, w, x, cols, row, j);
        for (; j < s.count; ++j) dot_floats<1>(s, w, x, cols, row, j);
    }
}

}  // namespace fomoe::cpu::FOMOE_ISA
