// An attention layer's inputs and its cache of keys and values.
//
// Defined outside: HEADS, KV_HEADS, HEAD_DIM, ROPE_DIMS, KV_F32 (0: half, 1: float), THREADS. Keys
// lie as [ctx, KV_HEADS, HEAD_DIM], values as [ctx / 32, KV_HEADS, HEAD_DIM, 32]: 32 positions of a
// dimension side by side, so that a sum over positions reads them in one piece.
#pragma once

#include "rows.h"
#include "step.h"

constexpr int kTile = 32;  // positions
constexpr int kUnits = THREADS / kUnit;
constexpr int kShared = HEADS / KV_HEADS;  // query heads of a kv head
constexpr float kLowest = -1e30f;          // below any score, and exp(kLowest - kLowest) is 1

#if KV_F32
typedef float Stored;
FM_DEV Stored to_stored(float x) { return x; }
#else
typedef unsigned short Stored;
FM_DEV Stored to_stored(float x) { return (Stored)fm_f2h(x); }
#endif

struct Cache {
  Stored *keys, *values;
  FM_DEV Stored* key(int position, int head) const {
    return keys + ((long long)position * KV_HEADS + head) * HEAD_DIM;
  }
  FM_DEV Stored* value(int position, int head, int dim) const {
    const long long block = ((long long)(position / kTile) * KV_HEADS + head) * HEAD_DIM + dim;
    return values + block * kTile + position % kTile;
  }
};

struct AttendWeights {
  const float *q_norm, *k_norm;     // [HEAD_DIM]
  const unsigned long long* turns;  // [ROPE_DIMS / 2]: turn per position, in 2^-64 of a turn
};

struct AttendInputs {
  const float* q;  // [T, HEADS, 2, HEAD_DIM]: query and gate of each head
  const float* k;  // [T, KV_HEADS, HEAD_DIM]
  const float* v;  // [T, KV_HEADS, HEAD_DIM]
};

// Where the query of a head of token t begins in [KV_HEADS, most, HEADS / KV_HEADS, HEAD_DIM].
FM_DEV long long query_at(int most, int t, int head) {
  return (((long long)(head / kShared) * most + t) * kShared + head % kShared) * HEAD_DIM;
}

// Cosine and sine of pair i at a position. Turns are counted modulo 1 in integers: a float angle
// of a late position would have lost its last bits.
struct Rotation {
  float cosine, sine;
};
FM_DEV Rotation rotation(const unsigned long long* turns, int i, int position) {
  const unsigned long long turn = turns[i] * (unsigned long long)position;
  const float angle = (float)(int)(unsigned)(turn >> 32) * (6.283185307179586f / 4294967296.0f);
  return {fm_cos(angle), fm_sin(angle)};
}

// The rotations of this lane's pairs at a position.
struct Rotations {
  static constexpr int kPairs = ROPE_DIMS / 2,
                       kTurns = kPairs > kUnit ? (kPairs + kUnit - 1) / kUnit : 1;
  Rotation of[kTurns];

  FM_DEV void begin(const unsigned long long* turns, int position) {
    FM_UNROLL
    for (int n = 0; n < kTurns; ++n) {
      const int i = unit_lane() + n * kUnit;
      if (i < kPairs) of[n] = rotation(turns, i, position);
    }
  }
  // Rotates a row of this unit.
  FM_DEV void turn(float* row) const {
    FM_UNROLL
    for (int n = 0; n < kTurns; ++n) {
      const int i = unit_lane() + n * kUnit;
      if (i >= kPairs) continue;
      const float a = row[i], b = row[i + kPairs];
      row[i] = fm_fma(a, of[n].cosine, -b * of[n].sine);
      row[i + kPairs] = fm_fma(b, of[n].cosine, a * of[n].sine);
    }
  }
};

// rms_norm(x) * factor, rotated, into `row` [HEAD_DIM], shared memory. One unit; every lane of the
// wave comes here, and when it returns the unit may read the row.
FM_DEV void norm_and_rotate(UnitVector<HEAD_DIM> x, const UnitVector<HEAD_DIM>& weight, float eps,
                            float factor, const Rotations& rotations, float* row, bool has) {
  rms_norm(x, weight, eps);
  x.scale(factor);
  if (has) x.store(row);
  fm_wave_sync();
  if (has) rotations.turn(row);
  fm_wave_sync();
}
