// One token of a DeltaNet layer in one launch: convolution, delta rule, gated norm, rows.
//
// Grid (PARTS, N_V): a group has DV / PARTS columns of the memory of a value head. What earlier
// tokens and the weights have is asked for before the launch that makes the inputs has ended: other
// launches that write ring and memory belong to other passes, and a copy, that of the step block,
// separates passes.
#include "delta.h"
#include "last.h"

constexpr int kColumns = DV / PARTS;
constexpr int kSlots = THREADS / kLanes;                  // columns side by side
constexpr int kTurns = (kColumns + kSlots - 1) / kSlots;  // columns of a thread
constexpr int kWaves = THREADS / FM_WAVE;
constexpr int kFinisher = (kWaves - 1) * (FM_WAVE / kUnit);  // unit that ends a head
static_assert(DV % PARTS == 0 && kColumns % 4 == 0, "parts of fours");

struct Token {
  float q[DK], k[DK], v[kColumns];
  float product;
  DeltaGates gates;
};

struct Place {
  int head, first;  // value head; its first column here
  FM_DEV int key_head() const { return head % N_K; }
  FM_DEV bool writes_keys() const { return head < N_K && first == 0; }
  FM_DEV int values() const { return 2 * kKeys + head * DV + first; }  // channel of its first value
};

// The columns of this group, in registers until the token is there: by way of shared memory they
// took 0.9 us more on an NVIDIA H200, with 64 heads and with 32.
struct Columns {
  float held[kTurns][kHeld];

  FM_DEV void ask(const float* memory) {
    FM_UNROLL
    for (int n = 0; n < kTurns; ++n) {
      const int column = (int)threadIdx.x / kLanes + n * kSlots;
      load_column(memory + (column < kColumns ? column : 0) * DK, held[n]);
    }
  }
  FM_DEV void take(int n, float* s) const {
    FM_UNROLL
    for (int i = 0; i < kHeld; ++i) s[i] = held[n][i];
  }
};

// The first wave's work: key and query.
struct KeyWork {
  BegunKeyQuery begun;

  FM_DEV void begin(const History& history, const DeltaWeights& w, const Place& at) {
    begun.begin(history, w.conv, 0, at.key_head());
  }
  FM_DEV void end(const float* qkv, float* ring_row, float eps, const Place& at,
                  Token& token) const {
    const int query_at = at.key_head() * DK, key_at = kKeys + query_at;
    UnitVector<DK> query, key;
    query.load(qkv + query_at);
    key.load(qkv + key_at);
    const KeyQuery both = begun.end(key, query, eps);
    if (unit_index()) return;
    both.q.store(token.q);
    both.k.store(token.k);
    if (unit_lane() == 0) token.product = both.product;
    if (!at.writes_keys()) return;
    query.store(ring_row + query_at);
    key.store(ring_row + key_at);
  }
};

// The other waves' work: values, four by four, and the gates by the last thread.
struct ValueWork {
  static constexpr int kStride = 4 * (THREADS - FM_WAVE);
  static constexpr int kFours = (kColumns + kStride - 1) / kStride;
  Begun begun[kFours];
  float ssm_a, dt_bias;

  FM_DEV static int column(int n) { return 4 * ((int)threadIdx.x - FM_WAVE) + n * kStride; }
  FM_DEV void begin(const History& history, const DeltaWeights& w, const Place& at) {
    FM_UNROLL
    for (int n = 0; n < kFours; ++n)
      if (column(n) < kColumns) begun[n].begin(history, w.conv, 0, at.values() + column(n));
    ssm_a = w.ssm_a[at.head];
    dt_bias = w.dt_bias[at.head];
  }
  FM_DEV void end(const DeltaInputs& in, float* ring_row, const Place& at, Token& token) const {
    FM_UNROLL
    for (int n = 0; n < kFours; ++n) {
      if (column(n) >= kColumns) continue;
      float now[4];
      load_floats<4>(in.qkv + at.values() + column(n), now);
      begun[n].end(now, token.v + column(n));
      store_floats<4>(ring_row + at.values() + column(n), now);
    }
    if (threadIdx.x == THREADS - 1)
      token.gates = delta_gates(ssm_a, dt_bias, in.alpha[at.head], in.beta[at.head]);
  }
};

struct DeltaScratch {
  float* outputs;      // [N_V * DV]
  unsigned* finished;  // [N_V], zeros between launches
};

// Outputs of the whole head in shared or scratch memory; null for groups that are not the last.
FM_DEV const float* whole_head(const DeltaScratch& scratch, const Place& at, float* outputs,
                               int* flag) {
  fm_barrier();
  if (PARTS == 1) return outputs;
  float* const all = scratch.outputs + at.head * DV;
  for (int i = threadIdx.x; i < kColumns; i += THREADS) all[at.first + i] = outputs[i];
  return is_last_group(scratch.finished + at.head, PARTS, flag) ? all : nullptr;
}

// The delta rule on every column of the group.
FM_DEV void run_columns(const Columns& columns, const Token& token, float* memory, float* outputs) {
  float k[kHeld], q[kHeld];
  load_column(token.k, k);
  load_column(token.q, q);
  FM_UNROLL
  for (int n = 0; n < kTurns; ++n) {
    const int column = (int)threadIdx.x / kLanes + n * kSlots;
    const bool has = column < kColumns;
    float s[kHeld];
    columns.take(n, s);
    const float o = delta_column(s, k, q, token.v[has ? column : 0], token.gates, token.product);
    if (!has) continue;
    store_column(memory + column * DK, s);
    if (threadIdx.x % kLanes == 0) outputs[column] = o;
  }
}

FM_KERNEL(THREADS)
void delta(const fm_step* step, unsigned long long ring_at, unsigned long long memory_at,
           DeltaWeights w, DeltaInputs in, float eps, DeltaScratch scratch, RowsOut out) {
  FM_SHARED Token token;
  FM_SHARED float outputs[kColumns];
  FM_SHARED int flag;
  fm_release_next();
  const Place at = {(int)blockIdx.y, (int)blockIdx.x * kColumns};
  const unsigned long long state = step->state;
  const int position = step->position;
  float* const ring = (float*)(state + ring_at);
  float* const memory = (float*)(state + memory_at) + (at.head * DV + at.first) * DK;
  float* const ring_row = ring + position % CONV * kChannels;
  const History history = {in.qkv, ring, position};
  const bool makes_keys = wave_index() == 0, finishes = wave_index() == kWaves - 1;

  Columns columns;
  columns.ask(memory);
  KeyWork keys;
  ValueWork values;
  if (makes_keys)
    keys.begin(history, w, at);
  else
    values.begin(history, w, at);
  UnitVector<DV> norm, gate;
  if (finishes) norm.load(w.norm);
  fm_wait_before();

  if (finishes) gate.load(in.z + at.head * DV);
  if (makes_keys)
    keys.end(in.qkv, ring_row, eps, at, token);
  else
    values.end(in, ring_row, at, token);
  fm_barrier();
  run_columns(columns, token, memory, outputs);
  const float* const head = whole_head(scratch, at, outputs, &flag);
  if (head && finishes)
    finish_head(head, gate, norm, eps, out, at.head * DV, unit_index() == kFinisher);
}
