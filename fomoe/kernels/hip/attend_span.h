// Attention of some query vectors to a cache, 32 positions at a time, in float32.
//
// Defined outside, beside what attention.h wants: ROWS query vectors of a group that share its
// keys. A lane has a position of the scores, a thread a dimension of the sums.
#pragma once

#include "attention.h"

constexpr int kSlice = HEAD_DIM / kUnits < 8 ? 8 : HEAD_DIM / kUnits;  // dimensions of a unit
constexpr int kSlices = HEAD_DIM / kSlice;
constexpr int kPer16 = 16 / (int)sizeof(Stored);  // values of a 16-byte load
static_assert(kSlices * kSlice == HEAD_DIM && HEAD_DIM % 8 == 0 && THREADS >= HEAD_DIM, "slices");

// N stored values as they came, and as floats.
template <int N>
struct Packed {
  fm_u4 words[N / kPer16];

  FM_DEV void load(const Stored* p) {
    FM_UNROLL
    for (int i = 0; i < N / kPer16; ++i) words[i] = fm_load16(p + kPer16 * i);
  }
  FM_DEV void clear() {
    for (fm_u4& w : words) w.x = w.y = w.z = w.w = 0;
  }
  // Values 8 i to 8 i + 7.
  FM_DEV void eight(int i, float* out) const {
#if KV_F32
    for (int j = 0; j < 2; ++j) unpack(words[2 * i + j], out + 4 * j);
#else
    const fm_u4 w = words[i];
    const unsigned four[4] = {w.x, w.y, w.z, w.w};
    for (int j = 0; j < 4; ++j) {
      out[2 * j] = fm_h2f(four[j] & 0xffff);
      out[2 * j + 1] = fm_h2f(four[j] >> 16);
    }
#endif
  }
  // Values from `count` on become 0, but value `count` itself becomes `next`.
  FM_DEV void cut(int count, Stored next) {
    FM_UNROLL
    for (int i = 0; i < N / kPer16; ++i) {
      words[i].x = cut_word(words[i].x, i * 4, count, next);
      words[i].y = cut_word(words[i].y, i * 4 + 1, count, next);
      words[i].z = cut_word(words[i].z, i * 4 + 2, count, next);
      words[i].w = cut_word(words[i].w, i * 4 + 3, count, next);
    }
  }

 private:
#if KV_F32
  static FM_DEV void unpack(const fm_u4& w, float* out) {
    out[0] = fm_bits<float>(w.x);
    out[1] = fm_bits<float>(w.y);
    out[2] = fm_bits<float>(w.z);
    out[3] = fm_bits<float>(w.w);
  }
  static FM_DEV unsigned cut_word(unsigned word, int at, int count, float next) {
    return at < count ? word : at == count ? fm_bits<unsigned>(next) : 0;
  }
#else
  static FM_DEV unsigned cut_word(unsigned word, int at, int count, unsigned next) {
    const unsigned low = 2 * at < count ? word & 0xffff : 2 * at == count ? next : 0;
    const unsigned high = 2 * at + 1 < count ? word >> 16 : 2 * at + 1 == count ? next : 0;
    return low | high << 16;
  }
#endif
};

// Shared memory of a group that attends.
struct Attention {
  alignas(16) float q[ROWS][HEAD_DIM];  // divided by sqrt(HEAD_DIM)
  alignas(16) float partial[kSlices][ROWS][kTile];
  alignas(16) float p[ROWS][kTile];
  float factor[ROWS], mass[ROWS], top[ROWS];
};

// Scores of this unit's dimensions, at the position of this lane.
FM_DEV void score(Attention& a, const Packed<kSlice>& key) {
  const int unit = unit_index();
  if (unit >= kSlices) return;
  float sum[ROWS];
  for (float& s : sum) s = 0.0f;
  FM_UNROLL
  for (int i = 0; i < kSlice / 8; ++i) {
    float k[8];
    key.eight(i, k);
    FM_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      float q[8];
      load_floats<8>(a.q[r] + unit * kSlice + 8 * i, q);
      for (int j = 0; j < 8; ++j) sum[r] = fm_fma(q[j], k[j], sum[r]);
    }
  }
  for (int r = 0; r < ROWS; ++r) a.partial[unit][r][unit_lane()] = sum[r];
}

// Scores to weights. Row r sees the positions up to sees(r); this tile begins at `first`.
template <class Sees>
FM_DEV void weigh(Attention& a, int first, const Sees& sees) {
  constexpr int turns = (ROWS + kUnits - 1) / kUnits;
  FM_UNROLL
  for (int n = 0; n < turns; ++n) {
    const int row = unit_index() + n * kUnits, r = row < ROWS ? row : ROWS - 1;
    const bool seen = first + unit_lane() <= sees(r);
    float s = 0.0f;
    for (int i = 0; i < kSlices; ++i) s += a.partial[i][r][unit_lane()];
    s = seen ? s : kLowest;
    const float before = a.top[r], top = fm_max(before, lanes_max(s));
    const float p = seen ? fm_exp(s - top) : 0.0f, mass = lanes_sum(p);
    if (row >= ROWS) continue;
    a.p[r][unit_lane()] = p;
    if (unit_lane()) continue;
    const float factor = fm_exp(before - top);
    a.factor[r] = factor;
    a.mass[r] = fm_fma(a.mass[r], factor, mass);
    a.top[r] = top;
  }
}

// sum[r] = sum[r] * factor + p . values, of the dimension of this thread.
FM_DEV void mix(const Attention& a, const Packed<kTile>& value, float* sum) {
  FM_UNROLL
  for (int r = 0; r < ROWS; ++r) sum[r] *= a.factor[r];
  FM_UNROLL
  for (int i = 0; i < kTile / 8; ++i) {
    float v[8];
    value.eight(i, v);
    FM_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      float p[8];
      load_floats<8>(a.p[r] + 8 * i, p);
      for (int j = 0; j < 8; ++j) sum[r] = fm_fma(p[j], v[j], sum[r]);
    }
  }
}

FM_DEV void begin(Attention& a) {
  for (int r = threadIdx.x; r < ROWS; r += THREADS) {
    a.top[r] = kLowest;
    a.mass[r] = 0.0f;
  }
}

// Positions [first, stop) of a kv head, of which those from `stored` on are not in the cache.
struct Span {
  int head, first, stop, stored;
};

// A walk over a span that begins at a tile. Keys and values of kAhead tiles are on their way: `ask`
// asks for the first ones, `run` for the others.
template <int kAhead>
struct Walk {
  Cache cache;
  Span span;
  Packed<kSlice> key[kAhead];
  Packed<kTile> value[kAhead];

  FM_DEV Walk(const Cache& c, const Span& s) : cache(c), span(s) {}
  FM_DEV static int slice() { return (unit_index() < kSlices ? unit_index() : 0) * kSlice; }
  FM_DEV static int dim() { return (int)threadIdx.x < HEAD_DIM ? threadIdx.x : 0; }

  FM_DEV void ask_key(Packed<kSlice>& of, int first) const {
    const int position = first + unit_lane();
    of.clear();
    if (position < span.stored && position < span.stop)
      of.load(cache.key(position, span.head) + slice());
  }
  FM_DEV void ask_value(Packed<kTile>& of, int first) const {
    if (first < span.stop) of.load(cache.value(first, span.head, dim()));
  }
  FM_DEV void ask() {
    FM_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      ask_key(key[i], span.first + i * kTile);
      ask_value(value[i], span.first + i * kTile);
    }
  }

  // Attends ROWS rows; sum[r] is of the dimension of this thread and not yet divided by a.mass.
  // `fresh` holds key and value of position `stored`, or is null.
  template <class Sees>
  FM_DEV void run(Attention& a, const Sees& sees, const Stored (*fresh)[HEAD_DIM], float* sum) {
    for (int r = 0; r < ROWS; ++r) sum[r] = 0.0f;
    for (int first = span.first; first < span.stop; first += kAhead * kTile) {
      FM_UNROLL
      for (int i = 0; i < kAhead; ++i)
        if (first + i * kTile < span.stop)
          step(a, sees, fresh, first + i * kTile, key[i], value[i], sum);
    }
  }

 private:
  // The tile from `first` on; asks for the one that takes its registers. Of a single tile the values
  // come while scores are made, so that they need not be held from one tile to the next.
  template <class Sees>
  FM_DEV void step(Attention& a, const Sees& sees, const Stored (*fresh)[HEAD_DIM], int first,
                   Packed<kSlice>& keys, Packed<kTile>& values, float* sum) const {
    if (kAhead == 1 && first != span.first) ask_value(values, first);
    if (fresh && first + unit_lane() == span.stored) keys.load(fresh[0] + slice());
    score(a, keys);
    ask_key(keys, first + kAhead * kTile);
    fm_barrier();
    weigh(a, first, sees);
    fm_barrier();
    if (span.stored < first + kTile)
      values.cut(span.stored - first, fresh ? fresh[1][dim()] : to_stored(0.0f));
    mix(a, values, sum);
    if (kAhead > 1) ask_value(values, first + kAhead * kTile);
  }
};
