// Causal attention of a prompt's tokens over what the cache holds, in float32; gate and rows.
//
// A group has TOKENS tokens of some query heads of a kv head. A token's bits do not depend on the
// chunk it comes in.
#include "attend_span.h"

constexpr int kHeadsOf = ROWS / TOKENS;  // query heads of a group
static_assert(kHeadsOf * TOKENS == ROWS && kShared % kHeadsOf == 0, "rows of tokens and heads");

// Grid (HEADS / kHeadsOf, blocks of TOKENS tokens); the latest tokens, which have most to do,
// first.
FM_KERNEL(THREADS)
void attend_rows(const fm_step* step, unsigned long long keys_at, unsigned long long values_at,
                 const float* queries, int most, const float* q_and_gate, RowsOut out) {
  FM_SHARED Attention a;
  const int tokens = step->tokens, head = (int)blockIdx.x * kHeadsOf;
  const int blocks = (tokens + TOKENS - 1) / TOKENS, block = blocks - 1 - (int)blockIdx.y;
  if (block < 0) return;
  const int t0 = block * TOKENS, last = t0 + TOKENS < tokens ? t0 + TOKENS - 1 : tokens - 1;
  const auto token_of = [&](int r) { return t0 + r / kHeadsOf; };
  for (int i = 4 * threadIdx.x; i < ROWS * HEAD_DIM; i += 4 * THREADS) {
    const int r = i / HEAD_DIM, t = token_of(r) < last ? token_of(r) : last;
    float four[4];
    load_floats<4>(queries + query_at(most, t, head + r % kHeadsOf) + i % HEAD_DIM, four);
    store_floats<4>(a.q[r] + i % HEAD_DIM, four);
  }
  begin(a);
  fm_barrier();

  const int position = step->position;
  const Cache cache = {(Stored*)(step->state + keys_at), (Stored*)(step->state + values_at)};
  const Span span = {head / kShared, 0, position + last + 1, position + tokens};
  float sum[ROWS];
  Walk<1> walk(cache, span);
  walk.ask();
  walk.run(a, [&](int r) { return position + token_of(r); }, nullptr, sum);

  const int dim = (int)threadIdx.x < HEAD_DIM ? threadIdx.x : 0;
  FM_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const bool has = token_of(r) <= last;
    const long long row = (long long)(has ? token_of(r) : last) * HEADS + head + r % kHeadsOf;
    const float o = sum[r] / a.mass[r] * sigmoid(q_and_gate[(2 * row + 1) * HEAD_DIM + dim]);
    put_one(out, row * HEAD_DIM + dim, o, has && threadIdx.x < HEAD_DIM);
  }
}
