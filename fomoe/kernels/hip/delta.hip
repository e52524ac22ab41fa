// One token of a DeltaNet layer in one launch: convolution, delta rule, gated norm, rows.
//
// Grid (PARTS, N_V): a group has DV / PARTS columns of the memory of a value head. The memory is
// asked for first, so that all of it is under way while the rest is computed.
#include "delta.h"
#include "last.h"

constexpr int kColumns = DV / PARTS;
constexpr int kSlots = THREADS / kLanes;                    // columns side by side
constexpr int kTurns = (kColumns + kSlots - 1) / kSlots;    // columns of a thread
static_assert(DV % PARTS == 0 && kColumns % 4 == 0, "parts of fours");

struct Token {
  float q[DK], k[DK], v[kColumns];
  float product;
  DeltaGates gates;
};

struct Place {
  int head, first;  // value head; its first column here
  FM_DEV bool writes_keys() const { return head < N_K && first == 0; }
};

FM_DEV void remember(const History& history, float* ring, int channel) {
  float now[4];
  load_floats<4>(history.now + channel, now);
  store_floats<4>(ring + (history.position % CONV) * kChannels + channel, now);
}

// By the first wave.
FM_DEV void prepare_keys(const History& history, float* ring, const DeltaWeights& w, float eps,
                         const Place& at, Token& token) {
  const int head = at.head % N_K;
  const KeyQuery both = key_query(history, w.conv, 0, head, eps);
  if (unit_index()) return;
  both.q.store(token.q);
  both.k.store(token.k);
  if (unit_lane() == 0) token.product = both.product;
  if (!at.writes_keys()) return;
  for (int s = 0; s < both.q.kStrips; ++s) {
    if (!both.q.has(s)) continue;
    remember(history, ring, head * DK + both.q.at(s));
    remember(history, ring, kKeys + head * DK + both.q.at(s));
  }
}

// By the other waves.
FM_DEV void prepare_values(const History& history, float* ring, const DeltaInputs& in,
                           const DeltaWeights& w, const Place& at, Token& token) {
  const int first = 2 * kKeys + at.head * DV + at.first;
  for (int i = 4 * ((int)threadIdx.x - FM_WAVE); i < kColumns; i += 4 * (THREADS - FM_WAVE)) {
    convolve_four(history, w.conv, 0, first + i, token.v + i);
    remember(history, ring, first + i);
  }
  if (threadIdx.x == THREADS - 1) token.gates = delta_gates(in, w, 0, at.head);
}

struct DeltaScratch {
  float* outputs;      // [N_V * DV]
  unsigned* finished;  // [N_V], zeros between launches
};

// Outputs of the whole head in shared or scratch memory; null for groups that are not the last.
FM_DEV const float* whole_head(const DeltaScratch& scratch, const Place& at, float* outputs,
                               int* flag) {
  if (PARTS == 1) {
    fm_barrier();
    return outputs;
  }
  float* const all = scratch.outputs + at.head * DV;
  fm_barrier();
  for (int i = threadIdx.x; i < kColumns; i += THREADS) all[at.first + i] = outputs[i];
  return is_last_group(scratch.finished + at.head, PARTS, flag) ? all : nullptr;
}

FM_KERNEL(THREADS)
void delta(const fm_step* step, unsigned long long ring_at, unsigned long long memory_at,
           DeltaWeights w, DeltaInputs in, float eps, DeltaScratch scratch, RowsOut out) {
  FM_SHARED Token token;
  FM_SHARED float outputs[kColumns];
  FM_SHARED int flag;
  const Place at = {(int)blockIdx.y, (int)blockIdx.x * kColumns};
  const unsigned long long state = step->state;
  float* const ring = (float*)(state + ring_at);
  float* const memory = (float*)(state + memory_at) + (at.head * DV + at.first) * DK;
  const int slot = threadIdx.x / kLanes;

  float held[kTurns][kHeld];
  FM_UNROLL
  for (int n = 0; n < kTurns; ++n) {
    for (int i = 0; i < kHeld; ++i) held[n][i] = 0.0f;
    const int column = slot + n * kSlots;
    if (column < kColumns) load_column(memory + column * DK, held[n]);
  }

  const History history = {in.qkv, ring, step->position};
  if (wave_index() == 0)
    prepare_keys(history, ring, w, eps, at, token);
  else
    prepare_values(history, ring, in, w, at, token);
  fm_barrier();

  float k[kHeld], q[kHeld];
  load_column(token.k, k);
  load_column(token.q, q);
  FM_UNROLL
  for (int n = 0; n < kTurns; ++n) {
    const int column = slot + n * kSlots;
    const float v = column < kColumns ? token.v[column] : 0.0f;
    const float o = delta_column(held[n], k, q, v, token.gates, token.product);
    if (column >= kColumns) continue;
    store_column(memory + column * DK, held[n]);
    if (threadIdx.x % kLanes == 0) outputs[column] = o;
  }

  const float* const head = whole_head(scratch, at, outputs, &flag);
  if (head && wave_index() == 0)
    finish_head(head, in.z + at.head * DV, w, eps, out, at.head * DV, unit_index() == 0);
}
