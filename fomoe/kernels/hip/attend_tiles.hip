// Causal attention of a prompt's tokens over a cache of halves, on matrix units; gate and rows.
//
// A wave has 16 of the query vectors of a kv head, in the order (token, head), and goes through
// the positions 32 at a time. Scores and weights pass through shared memory, where a row belongs
// to neighbouring lanes. A token's bits do not depend on the chunk it comes in.
#include "attention.h"

constexpr int kWaves = THREADS / FM_WAVE;
constexpr int kRows = 16;
constexpr int kLanes = FM_WAVE / kRows;  // lanes that share a row of weights
constexpr int kEach = kTile / kLanes;    // positions of such a lane
constexpr int kDims = HEAD_DIM / 16;     // tiles of sums
static_assert(HEAD_DIM % 32 == 0 && !KV_F32, "fragments of 32 halves");

// Shared memory of a wave; rows are apart by what keeps lanes off each other's banks.
struct WaveTile {
  alignas(16) float scores[kRows][kTile + 4];
  alignas(16) unsigned short weights[kRows][kTile + 8];
  float factor[kRows];
};

// What a lane knows of the row whose weights it makes.
struct RowState {
  int sees;  // the last position that the row may see
  float top, mass;
};

// Scores of the wave's rows at positions [first, first + 32).
FM_DEV void score(const unsigned short* queries, const Stored* keys, WaveTile& tile) {
  fm_half_c sums[2] = {fm_half_zero(), fm_half_zero()};
  constexpr int key_stride = KV_HEADS * HEAD_DIM;
#pragma unroll 2  // more fragments in flight have no registers left
  for (int d = 0; d < HEAD_DIM; d += 32) {
    const fm_half_tile query = fm_half_load(queries + d, 2 * HEAD_DIM);
    FM_UNROLL
    for (int n = 0; n < 2; ++n)
      fm_half_mma(sums[n], query,
                  fm_half_load(keys + 16 * n * key_stride + d, 2 * key_stride));
  }
  FM_UNROLL
  for (int i = 0; i < FM_TILE_REGS; ++i)
    for (int n = 0; n < 2; ++n)
      tile.scores[fm_tile_row(i)][16 * n + fm_tile_col(i)] = sums[n][i];
}

// Scores to weights, rounded to half; the mass is that of the rounded ones.
FM_DEV void weigh(WaveTile& tile, int first, RowState& state) {
  const int row = fm_lane() / kLanes, begin = fm_lane() % kLanes * kEach;
  const int seen = state.sees - first - begin;  // the last of this lane's that the row may see
  float s[kEach];
  load_floats<kEach>(tile.scores[row] + begin, s);
  float top = state.top;
  FM_UNROLL
  for (int j = 0; j < kEach; ++j) top = j <= seen ? fm_max(top, s[j]) : top;
  top = lanes_max<kLanes>(top);
  float mass = 0.0f;
  unsigned packed[kEach / 2];
  FM_UNROLL
  for (int j = 0; j < kEach; ++j) {
    const unsigned p = fm_f2h(j <= seen ? fm_exp(s[j] - top) : 0.0f);
    mass += fm_h2f(p);
    packed[j / 2] = j % 2 ? packed[j / 2] | p << 16 : p;
  }
  const float factor = fm_exp(state.top - top);
  state.mass = fm_fma(state.mass, factor, lanes_sum<kLanes>(mass));
  state.top = top;
  FM_UNROLL
  for (int j = 0; j < kEach / 2; j += 4) {
    fm_u4 four;
    four.x = packed[j];
    four.y = packed[j + 1];
    four.z = packed[j + 2];
    four.w = packed[j + 3];
    *(fm_u4*)(tile.weights[row] + begin + 2 * j) = four;
  }
  if (begin == 0) tile.factor[row] = factor;
}

// sums = sums * factor + weights . values; `values` [HEAD_DIM, 32] is a block of the cache.
FM_DEV void mix(const WaveTile& tile, const Stored* values, fm_half_c* sums) {
  const float less = 1.0f - tile.factor[fm_lane() % kRows];
  if (fm_wave_max(less) > 0.0f) {  // rarely, once the first positions have been seen
    FM_UNROLL
    for (int i = 0; i < FM_TILE_REGS; ++i) {
      const float factor = tile.factor[fm_tile_row(i)];
      FM_UNROLL
      for (int d = 0; d < kDims; ++d) sums[d][i] *= factor;
    }
  }
  const fm_half_tile weights = fm_half_load(tile.weights, sizeof(tile.weights[0]));
  FM_UNROLL
  for (int d = 0; d < kDims; ++d)
    fm_half_mma(sums[d], weights, fm_half_load(values + 16 * d * kTile, 2 * kTile));
}

// Which query vectors a wave has.
struct Block {
  int kv_head, first, tokens;
  FM_DEV int token(int row) const { return (first + row) / kShared; }
  FM_DEV bool has(int row) const { return token(row) < tokens; }
  FM_DEV int last_token() const {
    const int t = token(kRows - 1);
    return t < tokens ? t : tokens - 1;
  }
};

// Sums to rows, 32 dimensions at a time through shared memory; 8 lanes have a row's 32.
FM_DEV void finish(const Block& block, WaveTile& tile, const fm_half_c* sums,
                   const float* q_and_gate, const RowsOut& out) {
  FM_UNROLL
  for (int d = 0; d < kDims; d += 2) {
    FM_UNROLL
    for (int i = 0; i < FM_TILE_REGS; ++i)
      for (int n = 0; n < 2; ++n)
        tile.scores[fm_tile_row(i)][16 * n + fm_tile_col(i)] =
            sums[d + n][i] * tile.factor[fm_tile_row(i)];
    fm_barrier();
    for (int r = fm_lane() / 8; r < kRows; r += FM_WAVE / 8) {
      const bool has = block.has(r);
      const int t = has ? block.token(r) : 0, head = (block.first + r) % kShared;
      const long long row = (long long)t * HEADS + block.kv_head * kShared + head;
      const int dim = 16 * d + fm_lane() % 8 * 4;
      float v[4], gate[4];
      load_floats<4>(tile.scores[r] + dim % 32, v);
      load_floats<4>(q_and_gate + (2 * row + 1) * HEAD_DIM + dim, gate);
      for (int i = 0; i < 4; ++i) v[i] *= sigmoid(gate[i]);
      put_four(out, row * HEAD_DIM + dim, v, has);
    }
    fm_barrier();
  }
}

// Grid (KV_HEADS, blocks of kWaves * 16 query vectors); the latest, which have most to do, first.
// `queries` is half [KV_HEADS, most, HEADS / KV_HEADS, HEAD_DIM], and room for 16 vectors more.
FM_KERNEL(THREADS)
void attend_tiles(const fm_step* step, unsigned long long keys_at, unsigned long long values_at,
                  const unsigned short* queries, int most, const float* q_and_gate, RowsOut out) {
  FM_SHARED WaveTile tiles[kWaves];
  const int tokens = step->tokens, position = step->position, each = kWaves * kRows;
  const int groups = (tokens * kShared + each - 1) / each, group = groups - 1 - (int)blockIdx.y;
  if (group < 0) return;
  const int wave = wave_index();
  const Block block = {(int)blockIdx.x, group * each + wave * kRows, tokens};
  const Block last = {(int)blockIdx.x, group * each + (kWaves - 1) * kRows, tokens};
  const Cache cache = {(Stored*)(step->state + keys_at), (Stored*)(step->state + values_at)};
  const int first_read = block.has(0) ? block.first : 0;  // waves beyond the last token idle along
  const unsigned short* const mine =
      queries + ((long long)block.kv_head * most * kShared + first_read) * HEAD_DIM;
  WaveTile& tile = tiles[wave];
  RowState state = {position + block.token(fm_lane() / kLanes), kLowest, 0.0f};

  fm_half_c sums[kDims];
  FM_UNROLL
  for (fm_half_c& sum : sums) sum = fm_half_zero();
  const int stop = position + last.last_token() + 1;
  for (int first = 0; first < stop; first += kTile) {
    score(mine, cache.key(first, block.kv_head), tile);
    fm_barrier();
    weigh(tile, first, state);
    fm_barrier();
    mix(tile, cache.value(first, block.kv_head, 0), sums);
  }
  fm_barrier();
  if (fm_lane() % kLanes == 0) tile.factor[fm_lane() / kLanes] = 1.0f / state.mass;
  fm_barrier();
  finish(block, tile, sums, q_and_gate, out);
}
