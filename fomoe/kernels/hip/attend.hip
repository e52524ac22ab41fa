// One token of an attention layer in one launch: norms, rotation, cache, attention, gate, rows.
//
// Grid (SPLITS, HEADS / ROWS): a group attends ROWS query heads of a kv head to its share of the
// positions, and the last of those that share heads puts the parts together.
#include "attention.h"
#include "last.h"

constexpr int kSubsets = kShared / ROWS;  // groups of query heads that read the same keys
static_assert(kSubsets * ROWS == kShared, "subsets of query heads");

struct Part {
  float sum[ROWS][HEAD_DIM];
  float mass[ROWS], top[ROWS];
};

struct AttendScratch {
  Part* parts;         // [HEADS / ROWS, SPLITS]
  unsigned* finished;  // [HEADS / ROWS], zeros between launches
};

// How positions are shared out: whole tiles, equally; late splits of a short context have nothing.
struct Shares {
  int each, active;
  FM_DEV explicit Shares(int positions) {
    const int tiles = (positions + kTile - 1) / kTile;
    each = (tiles + SPLITS - 1) / SPLITS;
    active = (tiles + each - 1) / each;
  }
};

FM_DEV void prepare_queries(Attention& a, const AttendInputs& in, const AttendWeights& w, float eps,
                            int head, int position) {
  const float factor = 1.0f / fm_sqrt((float)HEAD_DIM);
  for (int n = 0; n < ROWS; n += kUnits) {
    const int row = n + unit_index(), r = row < ROWS ? row : ROWS - 1;
    norm_and_rotate(in.q + (head + r) * 2 * HEAD_DIM, w.q_norm, eps, factor, w.turns, position,
                    a.q[r], row < ROWS);
  }
}

// Key and value of the token itself, rounded as the cache has them.
FM_DEV void prepare_fresh(const AttendInputs& in, const AttendWeights& w, float eps, int kv_head,
                          int position, float* row, Stored (*fresh)[HEAD_DIM]) {
  const bool has = unit_index() == 0;
  norm_and_rotate(in.k + kv_head * HEAD_DIM, w.k_norm, eps, 1.0f, w.turns, position, row, has);
  fm_barrier();
  for (int i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
    fresh[0][i] = to_stored(row[i]);
    fresh[1][i] = to_stored(in.v[kv_head * HEAD_DIM + i]);
  }
}

FM_DEV void store_fresh(const Cache& cache, int position, int kv_head,
                        const Stored (*fresh)[HEAD_DIM]) {
  for (int i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
    cache.key(position, kv_head)[i] = fresh[0][i];
    *cache.value(position, kv_head, i) = fresh[1][i];
  }
}

// share[split][row]: what a part's sums are multiplied with; splits in ascending order.
FM_DEV void part_shares(const Part* parts, int active, float (*share)[ROWS]) {
  const int r = threadIdx.x;
  if (r >= ROWS) return;
  float top = kLowest, mass = 0.0f;
  for (int s = 0; s < active; ++s) top = fm_max(top, parts[s].top[r]);
  for (int s = 0; s < active; ++s) {
    share[s][r] = fm_exp(parts[s].top[r] - top);
    mass = fm_fma(parts[s].mass[r], share[s][r], mass);
  }
  for (int s = 0; s < active; ++s) share[s][r] /= mass;
}

// Row by row: a thread has a dimension, a unit one or more blocks of 32 of them.
FM_DEV void combine(const Part* parts, int active, const float (*share)[ROWS],
                    const AttendInputs& in, int head, const RowsOut& out) {
  const int dim = (int)threadIdx.x < HEAD_DIM ? threadIdx.x : 0;
  for (int r = 0; r < ROWS; ++r) {
    float sum = 0.0f;
    FM_UNROLL
    for (int s = 0; s < active; ++s) sum = fm_fma(parts[s].sum[r][dim], share[s][r], sum);
    sum *= sigmoid(in.q[(2 * (head + r) + 1) * HEAD_DIM + dim]);
    put_one(out, (head + r) * HEAD_DIM + dim, sum, threadIdx.x < HEAD_DIM);
  }
}

FM_KERNEL(THREADS)
void attend(const fm_step* step, unsigned long long keys_at, unsigned long long values_at,
            AttendWeights w, AttendInputs in, float eps, AttendScratch scratch, RowsOut out) {
  FM_SHARED Attention a;
  FM_SHARED Stored fresh[2][HEAD_DIM];
  FM_SHARED float share[SPLITS][ROWS];
  FM_SHARED int flag;
  const int position = step->position, split = blockIdx.x, head = (int)blockIdx.y * ROWS;
  const int kv_head = head / kShared;
  const Shares shares(position + 1);
  if (split >= shares.active) return;
  const Cache cache = {(Stored*)(step->state + keys_at), (Stored*)(step->state + values_at)};
  const bool has_fresh = split == shares.active - 1;

  if (has_fresh) prepare_fresh(in, w, eps, kv_head, position, &a.partial[0][0][0], fresh);
  prepare_queries(a, in, w, eps, head, position);
  begin(a);
  fm_barrier();
  if (has_fresh && head % kShared == 0) store_fresh(cache, position, kv_head, fresh);

  const int tiles = kTile * shares.each, end = (split + 1) * tiles;
  const Span span = {kv_head, split * tiles, has_fresh ? position + 1 : end, position};
  float sum[ROWS];
  attend_span(a, cache, span, [&](int) { return position; }, has_fresh ? fresh : nullptr, sum);

  Part* const parts = scratch.parts + (long long)blockIdx.y * SPLITS;
  if (threadIdx.x < HEAD_DIM)
    for (int r = 0; r < ROWS; ++r) parts[split].sum[r][threadIdx.x] = sum[r];
  if (threadIdx.x < ROWS) {
    parts[split].mass[threadIdx.x] = a.mass[threadIdx.x];
    parts[split].top[threadIdx.x] = a.top[threadIdx.x];
  }
  if (!is_last_group(scratch.finished + blockIdx.y, shares.active, &flag)) return;
  part_shares(parts, shares.active, share);
  fm_barrier();
  combine(parts, shares.active, share, in, head, out);
}
