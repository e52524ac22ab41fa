// One token of an attention layer in one launch: norms, rotation, cache, attention, gate, rows.
//
// Grid (HEADS / ROWS, SPLITS): a group attends ROWS query heads of a kv head to its share of the
// positions, AHEAD tiles of which are on their way, and the last of those that share heads puts the
// parts together. What earlier tokens and the weights have is asked for before the launch that makes
// the inputs has ended: other launches that write this cache belong to other passes, and a copy,
// that of the step block, separates passes.
#include "attend_span.h"
#include "last.h"

constexpr int kSubsets = kShared / ROWS;  // groups of query heads that read the same keys
static_assert(kSubsets * ROWS == kShared, "subsets of query heads");
using Tiles = Walk<AHEAD>;

struct Part {
  float sum[ROWS][HEAD_DIM];
  float mass[ROWS], top[ROWS];
};

struct AttendScratch {
  Part* parts;         // [HEADS / ROWS, SPLITS]
  unsigned* finished;  // [HEADS / ROWS], zeros between launches
};

// How positions are shared out: whole tiles, equally. FEW splits give each core a group; SPLITS, as
// many or more, pay when there is much to read. Late splits of a short context have nothing.
struct Shares {
  static constexpr int kMuch = 8;  // tiles of a split
  int each, active;
  FM_DEV explicit Shares(int positions) {
    const int tiles = (positions + kTile - 1) / kTile;
    const int splits = tiles < kMuch * SPLITS ? FEW : SPLITS;
    each = (tiles + splits - 1) / splits;
    active = (tiles + each - 1) / each;
  }
};

// Norms and rotations of the group's queries and of the token's key, whose row comes last: a unit
// has a row at a time.
struct Queries {
  static constexpr int kTurns = (ROWS + kUnits) / kUnits;
  UnitVector<HEAD_DIM> norm[kTurns];
  Rotations rotations;

  FM_DEV static int row(int n) { return unit_index() + n * kUnits; }
  FM_DEV void begin(const AttendWeights& w, int position) {
    FM_UNROLL
    for (int n = 0; n < kTurns; ++n) norm[n].load(row(n) < ROWS ? w.q_norm : w.k_norm);
    rotations.begin(w.turns, position);
  }
  // Queries to a.q; the key, rounded as the cache has it, to `fresh`, by way of `key` (both shared
  // memory). A barrier has to follow.
  FM_DEV void end(Attention& a, const AttendInputs& in, float eps, int head, float* key,
                  Stored* fresh) const {
    const float factor = 1.0f / fm_sqrt((float)HEAD_DIM);
    FM_UNROLL
    for (int n = 0; n < kTurns; ++n) {
      const bool is_query = row(n) < ROWS, is_key = row(n) == ROWS;
      UnitVector<HEAD_DIM> x;
      x.load(is_query ? in.q + (head + row(n)) * 2 * HEAD_DIM : in.k + head / kShared * HEAD_DIM);
      norm_and_rotate(x, norm[n], eps, is_query ? factor : 1.0f, rotations,
                      is_query ? a.q[row(n)] : key, is_query || is_key);
      if (!is_key) continue;
      for (int i = unit_lane(); i < HEAD_DIM; i += kUnit) fresh[i] = to_stored(key[i]);
    }
  }
};

FM_DEV void store_fresh(const Cache& cache, int position, int kv_head,
                        const Stored (*fresh)[HEAD_DIM]) {
  for (int i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
    cache.key(position, kv_head)[i] = fresh[0][i];
    *cache.value(position, kv_head, i) = fresh[1][i];
  }
}

// Of each part and row: what its sums are multiplied with, made in the place of its top.
struct PartShares {
  float share[SPLITS][ROWS], mass[SPLITS][ROWS];

  FM_DEV void make(const Part* parts, int active) {
    for (int i = threadIdx.x; i < active * ROWS; i += THREADS) {
      share[i / ROWS][i % ROWS] = parts[i / ROWS].top[i % ROWS];
      mass[i / ROWS][i % ROWS] = parts[i / ROWS].mass[i % ROWS];
    }
    fm_barrier();
    FM_UNROLL
    for (int n = 0; n < ROWS; n += kUnits) {
      const int row = n + unit_index(), count = row < ROWS ? active : 0;
      share_row(row < ROWS ? row : 0, count);
    }
    fm_barrier();
  }

 private:
  // One unit; a lane has every 32nd part.
  FM_DEV void share_row(int row, int count) {
    float top = kLowest, all = 0.0f;
    for (int s = unit_lane(); s < count; s += kUnit) top = fm_max(top, share[s][row]);
    top = lanes_max(top);
    for (int s = unit_lane(); s < count; s += kUnit) {
      share[s][row] = fm_exp(share[s][row] - top);
      all = fm_fma(mass[s][row], share[s][row], all);
    }
    all = lanes_sum(all);
    for (int s = unit_lane(); s < count; s += kUnit) share[s][row] /= all;
  }
};

// Sums of several parts, of all rows, that are on their way at a time.
struct PartSums {
  static constexpr int kAtOnce = ROWS <= 2 ? 16 : ROWS <= 16 ? 32 / ROWS : 1;
  float of[kAtOnce][ROWS];

  FM_DEV void ask(const Part* parts, int first, int active, int dim) {
    FM_UNROLL
    for (int j = 0; j < kAtOnce; ++j)
      FM_UNROLL
      for (int r = 0; r < ROWS; ++r)
        of[j][r] = first + j < active ? parts[first + j].sum[r][dim] : 0.0f;
  }
  FM_DEV void join(const PartShares& shares, int first, int active, float* sum) const {
    FM_UNROLL
    for (int j = 0; j < kAtOnce; ++j)
      FM_UNROLL
      for (int r = 0; r < ROWS; ++r)
        sum[r] = first + j < active ? fm_fma(of[j][r], shares.share[first + j][r], sum[r]) : sum[r];
  }
};

// A thread has a dimension, a unit one or more blocks of 32 of them; parts in ascending order.
FM_DEV void combine(const Part* parts, int active, PartShares& of, const AttendInputs& in, int head,
                    const RowsOut& out) {
  const int dim = Tiles::dim();
  float gate[ROWS], sum[ROWS];
  FM_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    gate[r] = in.q[(2 * (head + r) + 1) * HEAD_DIM + dim];
    sum[r] = 0.0f;
  }
  PartSums sums;
  sums.ask(parts, 0, active, dim);  // the first ones, while the shares are made
  of.make(parts, active);
  for (int s = 0; s < active; s += PartSums::kAtOnce) {
    if (s) sums.ask(parts, s, active, dim);
    sums.join(of, s, active, sum);
  }
  FM_UNROLL
  for (int r = 0; r < ROWS; ++r)
    put_one(out, (head + r) * HEAD_DIM + dim, sum[r] * sigmoid(gate[r]), threadIdx.x < HEAD_DIM);
}

FM_KERNEL(THREADS)
void attend(const fm_step* step, unsigned long long keys_at, unsigned long long values_at,
            AttendWeights w, AttendInputs in, float eps, AttendScratch scratch, RowsOut out) {
  FM_SHARED Attention a;
  FM_SHARED Stored fresh[2][HEAD_DIM];
  FM_SHARED float key[HEAD_DIM];
  FM_SHARED PartShares part_shares;
  FM_SHARED int flag;
  fm_release_next();
  const int position = step->position, head = (int)blockIdx.x * ROWS, split = blockIdx.y;
  const int kv_head = head / kShared;
  const Shares shares(position + 1);
  if (split >= shares.active) {
    fm_wait_before();  // as every group does: the end of a launch is the end of those before it
    return;
  }
  const bool has_fresh = split == shares.active - 1;
  const int tiles = kTile * shares.each, stop = has_fresh ? position + 1 : (split + 1) * tiles;
  const Cache cache = {(Stored*)(step->state + keys_at), (Stored*)(step->state + values_at)};
  Tiles walk(cache, {kv_head, split * tiles, stop, position});
  walk.ask();
  Queries queries;
  queries.begin(w, position);
  begin(a);
  fm_wait_before();

  const float value = in.v[kv_head * HEAD_DIM + Tiles::dim()];
  queries.end(a, in, eps, head, key, fresh[0]);
  if (threadIdx.x < HEAD_DIM) fresh[1][threadIdx.x] = to_stored(value);
  fm_barrier();
  if (has_fresh && head % kShared == 0) store_fresh(cache, position, kv_head, fresh);
  float sum[ROWS];
  walk.run(a, [&](int) { return position; }, has_fresh ? fresh : nullptr, sum);

  Part* const parts = scratch.parts + (long long)blockIdx.x * SPLITS;
  if (threadIdx.x < HEAD_DIM)
    for (int r = 0; r < ROWS; ++r) parts[split].sum[r][threadIdx.x] = sum[r];
  if (threadIdx.x < ROWS) {
    parts[split].mass[threadIdx.x] = a.mass[threadIdx.x];
    parts[split].top[threadIdx.x] = a.top[threadIdx.x];
  }
  if (is_last_group(scratch.finished + blockIdx.x, shares.active, &flag))
    combine(parts, shares.active, part_shares, in, head, out);
}
