// Inputs of attention for a prompt's tokens, all side by side: norms, rotation, cache.
#include "attention.h"

constexpr int kItems = HEADS + 2 * KV_HEADS;

// TILES: queries are half, for attend_tiles.hip; else float, for attend_chunk.hip.
#if TILES
typedef unsigned short Query;
FM_DEV Query to_query(float x) { return (Query)fm_f2h(x); }
#else
typedef float Query;
FM_DEV Query to_query(float x) { return x; }
#endif

// The last token also clears the rest of its 32 positions: tiles read them, with weights of zero.
FM_DEV void store_value(const Cache& cache, int position, int head, int dim, float x, bool last) {
  *cache.value(position, head, dim) = to_stored(x);
  for (int p = position + 1; TILES && last && p % kTile; ++p)
    *cache.value(p, head, dim) = to_stored(0.0f);
}

// Grid (items in units, tokens): an item is a query head, a key or a value.
FM_KERNEL(THREADS)
void attend_inputs(const fm_step* step, unsigned long long keys_at, unsigned long long values_at,
                   AttendWeights w, AttendInputs in, float eps, Query* queries) {
  FM_SHARED float rows[kUnits][HEAD_DIM];
  const int t = blockIdx.y, item = (int)blockIdx.x * kUnits + unit_index();
  if (t >= step->tokens) return;
  const int position = step->position + t, unit = unit_index(), lane = unit_lane();
  const bool is_query = item < HEADS;
  const bool is_key = !is_query && item < HEADS + KV_HEADS;
  const int head = is_query ? item : (item - HEADS) % KV_HEADS;
  const float* const x = is_query ? in.q + ((long long)t * HEADS + head) * 2 * HEAD_DIM
                                  : in.k + ((long long)t * KV_HEADS + head) * HEAD_DIM;
  const float factor = is_query ? 1.0f / fm_sqrt((float)HEAD_DIM) : 1.0f;
  UnitVector<HEAD_DIM> vector, norm;
  vector.load(x);
  norm.load(is_query ? w.q_norm : w.k_norm);
  Rotations rotations;
  rotations.begin(w.turns, position);
  norm_and_rotate(vector, norm, eps, factor, rotations, rows[unit], is_query || is_key);
  fm_barrier();
  if (item >= kItems) return;
  const Cache cache = {(Stored*)(step->state + keys_at), (Stored*)(step->state + values_at)};
  Query* const query = queries + query_at(gridDim.y, t, is_query ? head : 0);
  const float* const value = in.v + ((long long)t * KV_HEADS + head) * HEAD_DIM;
  for (int i = lane; i < HEAD_DIM; i += kUnit) {
    if (is_query)
      query[i] = to_query(rows[unit][i]);
    else if (is_key)
      cache.key(position, head)[i] = to_stored(rows[unit][i]);
    else
      store_value(cache, position, head, i, value[i], t == step->tokens - 1);
  }
}
