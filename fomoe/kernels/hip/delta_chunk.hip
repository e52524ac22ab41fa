// Tokens of a prompt through a DeltaNet layer, in three launches.
//
// `delta_inputs`: convolution and gates, all tokens side by side. `delta_scan`: the decode step in
// token order, memory in registers, inputs copied to shared memory ahead of their use.
// `delta_finish`: gated norm and rows, all tokens side by side. The arithmetic is that of decode,
// whatever the chunks.
#include "delta.h"

constexpr int kInputThreads = THREADS / 2;  // of the launches that have no memory to hold
constexpr int kUnits = kInputThreads / kUnit;
constexpr int kSlots = THREADS / kLanes;
constexpr int kAhead = 8;  // tokens of a stage

// Between the launches.
struct DeltaMiddle {
  float* key_query;  // [T, N_K, 2, DK]: key, query
  float* values;     // [T, N_V, DV]; outputs take their place
  fm_f4* gates;      // [T, N_V]: decay, beta, key . query, 0
};

// Grid: units are (token, key head) pairs.
FM_KERNEL(kInputThreads)
void delta_inputs(const fm_step* step, unsigned long long ring_at, DeltaWeights w, DeltaInputs in,
                  float eps, DeltaMiddle middle) {
  const int pair = (int)blockIdx.x * kUnits + unit_index(), head = pair % N_K;
  const int tokens = step->tokens, t = pair / N_K < tokens ? pair / N_K : tokens - 1;
  const bool has = pair / N_K < tokens;
  const History history = {in.qkv, (const float*)(step->state + ring_at), step->position};
  BegunKeyQuery begun;
  begun.begin(history, w.conv, t, head);
  UnitVector<DK> key, query;
  query.load(history.of(t) + head * DK);
  key.load(history.of(t) + kKeys + head * DK);
  const KeyQuery both = begun.end(key, query, eps);
  if (!has) return;
  float* const row = middle.key_query + ((long long)t * N_K + head) * 2 * DK;
  both.k.store(row);
  both.q.store(row + DK);
  for (int r = head; r < N_V; r += N_K) {
    float* const values = middle.values + (long long)t * kValues + r * DV;
    for (int i = 4 * unit_lane(); i < DV; i += 4 * kUnit) {
      float v[4];
      convolve_four(history, w.conv, t, 2 * kKeys + r * DV + i, v);
      store_floats<4>(values + i, v);
    }
    if (unit_lane()) continue;
    const int at = t * N_V + r;
    const DeltaGates g = delta_gates(w.ssm_a[r], w.dt_bias[r], in.alpha[at], in.beta[at]);
    const float four[4] = {g.decay, g.beta, both.product, 0.0f};
    store_floats<4>((float*)(middle.gates + (long long)t * N_V + r), four);
  }
}

constexpr int kParts = (DV + kSlots - 1) / kSlots;
constexpr int kColumns = (DV + kParts - 1) / kParts / 4 * 4;
static_assert(kColumns * kParts == DV, "parts of fours");

struct Stage {
  float key_query[kAhead][2 * DK];
  float values[kAhead][kColumns];
  float gates[kAhead][4];
};

// This lane's share of a token's key and query.
struct KeyShare {
  float k[kHeld], q[kHeld];
  FM_DEV void load(const Stage& stage, int j) {
    load_column(stage.key_query[j], k);
    load_column(stage.key_query[j] + DK, q);
  }
};

struct Scan {
  DeltaMiddle middle;
  int head, first, tokens;

  FM_DEV float* values(int t) const {
    return middle.values + (long long)t * kValues + head * DV + first;
  }
  // Begins to copy tokens `from` to `from` + kAhead.
  FM_DEV void fetch(Stage& stage, int from) const {
    constexpr int keys = 2 * DK / 4, values_of = kColumns / 4, row = keys + values_of + 1;
    for (int i = threadIdx.x; i < kAhead * row; i += THREADS) {
      const int j = i / row, four = i % row, t = from + j;
      if (t >= tokens) break;
      if (four < keys)
        fm_copy16(stage.key_query[j] + 4 * four,
                  middle.key_query + ((long long)t * N_K + head % N_K) * 2 * DK + 4 * four);
      else if (four < keys + values_of)
        fm_copy16(stage.values[j] + 4 * (four - keys), values(t) + 4 * (four - keys));
      else
        fm_copy16(stage.gates[j], middle.gates + (long long)t * N_V + head);
    }
    fm_copy_commit();
  }
};

// The last inputs of the convolution, for the pass that comes next.
FM_DEV void remember(const fm_step& now, float* ring, const float* qkv, int channel, int count) {
  const int kept = now.tokens < CONV ? now.tokens : CONV;
  for (int i = threadIdx.x; i < kept * count; i += THREADS) {
    const int t = now.tokens - kept + i / count, c = channel + i % count;
    ring[(long long)((now.position + t) % CONV) * kChannels + c] =
        qkv[(long long)t * kChannels + c];
  }
}

// Grid (kParts, N_V).
FM_KERNEL(THREADS)
void delta_scan(const fm_step* step, unsigned long long ring_at, unsigned long long memory_at,
                const float* qkv, DeltaMiddle middle) {
  FM_SHARED Stage stages[2];
  FM_SHARED float outputs[kAhead][kColumns];
  const Scan scan = {middle, (int)blockIdx.y, (int)blockIdx.x * kColumns, step->tokens};
  const int column = threadIdx.x / kLanes;
  const bool has = column < kColumns;
  float* const memory = (float*)(step->state + memory_at) +
                        ((long long)scan.head * DV + scan.first + (has ? column : 0)) * DK;
  float held[kHeld];
  load_column(memory, held);
  scan.fetch(stages[0], 0);
  for (int from = 0; from < scan.tokens; from += kAhead) {
    const Stage& stage = stages[from / kAhead % 2];
    scan.fetch(stages[(from / kAhead + 1) % 2], from + kAhead);
    fm_copy_wait<1>();
    fm_barrier();
    const int count = scan.tokens - from < kAhead ? scan.tokens - from : kAhead;
    const auto run = [&](int j, const KeyShare& in) {
      float gates[4];
      load_floats<4>(stage.gates[j], gates);
      const float v = has ? stage.values[j][column] : 0.0f;
      const float o = delta_column(held, in.k, in.q, v, {gates[0], gates[1]}, gates[2]);
      if (has && threadIdx.x % kLanes == 0) outputs[j][column] = o;
    };
    if (count == kAhead) {  // a token's key and query come while the one before is at work
      KeyShare even, odd;
      even.load(stage, 0);
      FM_NO_UNROLL
      for (int j = 0; j < kAhead; j += 2) {
        odd.load(stage, j + 1);
        run(j, even);
        even.load(stage, (j + 2) % kAhead);
        run(j + 1, odd);
      }
    } else {
      for (int j = 0; j < count; ++j) {
        KeyShare in;
        in.load(stage, j);
        run(j, in);
      }
    }
    fm_barrier();
    for (int i = threadIdx.x; i < count * kColumns; i += THREADS)
      scan.values(from + i / kColumns)[i % kColumns] = outputs[i / kColumns][i % kColumns];
  }
  if (has) store_column(memory, held);
  float* const ring = (float*)(step->state + ring_at);
  remember(*step, ring, qkv, 2 * kKeys + scan.head * DV + scan.first, kColumns);
  if (scan.head >= N_K || scan.first) return;
  remember(*step, ring, qkv, scan.head * DK, DK);
  remember(*step, ring, qkv, kKeys + scan.head * DK, DK);
}

// Grid: units are (token, value head) pairs.
FM_KERNEL(kInputThreads)
void delta_finish(const fm_step* step, DeltaWeights w, const float* z, float eps,
                  const float* outputs, RowsOut out) {
  const long long pair = (long long)blockIdx.x * kUnits + unit_index();
  const long long last = (long long)step->tokens * N_V - 1, at = pair < last ? pair : last;
  UnitVector<DV> gate, norm;
  gate.load(z + at * DV);
  norm.load(w.norm);
  finish_head(outputs + at * DV, gate, norm, eps, out, at * DV, pair <= last);
}
