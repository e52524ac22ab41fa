// Tokens of a prompt through an attention layer, in two launches.
//
// `attend_inputs`: norms, rotation and cache, all tokens side by side. `attend_rows`: causal
// attention over what the cache then holds, gate and rows; a group has TOKENS tokens of some query
// heads of a kv head. A token's bits do not depend on the chunk it comes in.
#include "attention.h"

constexpr int kHeadsOf = ROWS / TOKENS;  // query heads of a group
constexpr int kItems = HEADS + 2 * KV_HEADS;
static_assert(kHeadsOf * TOKENS == ROWS && kShared % kHeadsOf == 0, "rows of tokens and heads");

// Grid (items in units, tokens): an item is a query head, a key or a value.
FM_KERNEL(THREADS)
void attend_inputs(const fm_step* step, unsigned long long keys_at, unsigned long long values_at,
                   AttendWeights w, AttendInputs in, float eps, float* queries) {
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
  norm_and_rotate(x, is_query ? w.q_norm : w.k_norm, eps, factor, w.turns, position, rows[unit],
                  is_query || is_key);
  fm_barrier();
  if (item >= kItems) return;
  const Cache cache = {(Stored*)(step->state + keys_at), (Stored*)(step->state + values_at)};
  float* const query = queries + ((long long)t * HEADS + head) * HEAD_DIM;
  const float* const value = in.v + ((long long)t * KV_HEADS + head) * HEAD_DIM;
  for (int i = lane; i < HEAD_DIM; i += kUnit) {
    if (is_query)
      query[i] = rows[unit][i];
    else if (is_key)
      cache.key(position, head)[i] = to_stored(rows[unit][i]);
    else
      *cache.value(position, head, i) = to_stored(value[i]);
  }
}

// Grid (HEADS / kHeadsOf, blocks of TOKENS tokens); the latest tokens, which have most to do, first.
FM_KERNEL(THREADS)
void attend_rows(const fm_step* step, unsigned long long keys_at, unsigned long long values_at,
                 const float* queries, const float* q_and_gate, RowsOut out) {
  FM_SHARED Attention a;
  const int tokens = step->tokens, head = (int)blockIdx.x * kHeadsOf;
  const int blocks = (tokens + TOKENS - 1) / TOKENS, block = blocks - 1 - (int)blockIdx.y;
  if (block < 0) return;
  const int t0 = block * TOKENS, last = t0 + TOKENS < tokens ? t0 + TOKENS - 1 : tokens - 1;
  const auto token_of = [&](int r) { return t0 + r / kHeadsOf; };
  for (int i = 4 * threadIdx.x; i < ROWS * HEAD_DIM; i += 4 * THREADS) {
    const int r = i / HEAD_DIM, t = token_of(r) < last ? token_of(r) : last;
    float four[4];
    load_floats<4>(queries + ((long long)t * HEADS + head + r % kHeadsOf) * HEAD_DIM + i % HEAD_DIM,
                   four);
    store_floats<4>(a.q[r] + i % HEAD_DIM, four);
  }
  begin(a);
  fm_barrier();

  const int position = step->position;
  const Cache cache = {(Stored*)(step->state + keys_at), (Stored*)(step->state + values_at)};
  const Span span = {head / kShared, 0, position + last + 1, position + tokens};
  float sum[ROWS];
  attend_span(a, cache, span, [&](int r) { return position + token_of(r); }, nullptr, sum);

  const int dim = (int)threadIdx.x < HEAD_DIM ? threadIdx.x : 0;
  FM_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const bool has = token_of(r) <= last;
    const long long row = (long long)(has ? token_of(r) : last) * HEADS + head + r % kHeadsOf;
    const float o = sum[r] / a.mass[r] * sigmoid(q_and_gate[(2 * row + 1) * HEAD_DIM + dim]);
    put_one(out, row * HEAD_DIM + dim, o, has && threadIdx.x < HEAD_DIM);
  }
}
