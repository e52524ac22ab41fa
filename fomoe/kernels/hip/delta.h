// The gated delta rule of a DeltaNet layer, as decode and prompt both compute it.
//
// Defined outside: N_K, N_V heads, DK, DV their sizes, CONV taps. Value head r uses key head
// r mod N_K. Memory lies as [N_V][DV][DK] float32; the convolution remembers its last CONV inputs
// as a ring [CONV][channels], that of position p in place p mod CONV: while position p is written,
// those of p - 1 to p - CONV + 1 are read and no group waits for another.
#pragma once

#include "rows.h"
#include "step.h"

constexpr int kKeys = N_K * DK;
constexpr int kValues = N_V * DV;
constexpr int kChannels = 2 * kKeys + kValues;

struct DeltaWeights {
  const float* conv;     // [channels, CONV], oldest tap first
  const float* ssm_a;    // [N_V], -exp(A_log)
  const float* dt_bias;  // [N_V]
  const float* norm;     // [DV]
};

struct DeltaInputs {
  const float* qkv;    // [T, channels]
  const float* z;      // [T, N_V * DV]
  const float* alpha;  // [T, N_V]
  const float* beta;   // [T, N_V]
};

// Inputs of the convolution: token t of this pass, or with t < 0 what the ring remembers.
struct History {
  const float* now;
  const float* ring;
  int position;  // of token 0
  FM_DEV const float* of(int t) const {
    return t >= 0 ? now + (long long)t * kChannels
                  : ring + (long long)((position + t + CONV) % CONV) * kChannels;
  }
};

// The convolution of four channels up to the tap of the token itself, and that tap.
struct Begun {
  float sum[4], last[4];

  FM_DEV void clear() {
    for (int i = 0; i < 4; ++i) sum[i] = last[i] = 0.0f;
  }
  FM_DEV void begin(const History& history, const float* taps, int t, int channel) {
    float tap[4 * CONV];
    load_floats<4 * CONV>(taps + channel * CONV, tap);
    clear();
    FM_UNROLL
    for (int w = 0; w < CONV - 1; ++w) {
      float input[4];
      load_floats<4>(history.of(t - (CONV - 1) + w) + channel, input);
      for (int i = 0; i < 4; ++i) sum[i] = fm_fma(tap[i * CONV + w], input[i], sum[i]);
    }
    for (int i = 0; i < 4; ++i) last[i] = tap[i * CONV + CONV - 1];
  }
  // silu(convolution) with the token's own inputs.
  FM_DEV void end(const float* now, float* out) const {
    for (int i = 0; i < 4; ++i) out[i] = silu(fm_fma(last[i], now[i], sum[i]));
  }
};

FM_DEV void convolve_four(const History& history, const float* taps, int t, int channel,
                          float* out) {
  Begun begun;
  begun.begin(history, taps, t, channel);
  float now[4];
  load_floats<4>(history.of(t) + channel, now);
  begun.end(now, out);
}

// The same of the channels of a key head. One unit.
struct BegunHead {
  Begun strips[UnitVector<DK>::kStrips];

  FM_DEV void begin(const History& history, const float* taps, int t, int first) {
    FM_UNROLL
    for (int s = 0; s < UnitVector<DK>::kStrips; ++s) {
      strips[s].clear();
      if (UnitVector<DK>::has(s)) strips[s].begin(history, taps, t, first + UnitVector<DK>::at(s));
    }
  }
  FM_DEV UnitVector<DK> end(const UnitVector<DK>& now) const {
    UnitVector<DK> v;
    FM_UNROLL
    for (int s = 0; s < v.kStrips; ++s) strips[s].end(now.v + 4 * s, v.v + 4 * s);
    return v;
  }
};

// Key and query of a key head, normalised; q . k. One unit.
struct KeyQuery {
  UnitVector<DK> k, q;
  float product;
};
FM_DEV KeyQuery key_query(const UnitVector<DK>& key, const UnitVector<DK>& query, float eps) {
  // Three sums over the lanes side by side: the product of both is scaled, not computed again.
  const float queries = query.dot(query), keys = key.dot(key), product = query.dot(key);
  const float of_query = 1.0f / fm_sqrt((float)DK) / fm_sqrt(queries + eps);
  const float of_key = 1.0f / fm_sqrt(keys + eps);
  KeyQuery out = {key, query, product * of_query * of_key};
  out.q.scale(of_query);
  out.k.scale(of_key);
  return out;
}

// The inputs of a key head's convolutions that are there before its token. One unit.
struct BegunKeyQuery {
  BegunHead k, q;

  FM_DEV void begin(const History& history, const float* taps, int t, int head) {
    q.begin(history, taps, t, head * DK);
    k.begin(history, taps, t, kKeys + head * DK);
  }
  FM_DEV KeyQuery end(const UnitVector<DK>& key, const UnitVector<DK>& query, float eps) const {
    return key_query(k.end(key), q.end(query), eps);
  }
};

// log(1 + exp(x)); log1p(e) as e log(u) / (u - 1), u = 1 + e rounded, which rounding cannot hurt
// (Kahan).
FM_DEV float softplus(float x) {
  if (x > 20.0f) return x;
  const float e = fm_exp(x), u = 1.0f + e;
  return u == 1.0f ? e : fm_log(u) * (e / (u - 1.0f));
}

struct DeltaGates {
  float decay, beta;
};
FM_DEV DeltaGates delta_gates(float ssm_a, float dt_bias, float alpha, float beta) {
  return {fm_exp(ssm_a * softplus(alpha + dt_bias)), sigmoid(beta)};
}

// A column of a memory is shared by kLanes lanes: lane l has the fours l, l + kLanes, ... of it.
constexpr int kLanes = DK % 32 == 0 ? 8 : DK % 16 == 0 ? 4 : DK % 8 == 0 ? 2 : 1;
constexpr int kHeld = DK / kLanes;  // floats of a column per lane

FM_DEV void load_column(const float* p, float* held) {
  const int lane = (int)threadIdx.x % kLanes;
  FM_UNROLL
  for (int i = 0; i < kHeld; i += 4) load_floats<4>(p + kLanes * i + 4 * lane, held + i);
}
FM_DEV void store_column(float* p, const float* held) {
  const int lane = (int)threadIdx.x % kLanes;
  FM_UNROLL
  for (int i = 0; i < kHeld; i += 4) store_floats<4>(p + kLanes * i + 4 * lane, held + i);
}

FM_DEV float column_dot(const float* a, const float* b) {
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  FM_UNROLL
  for (int i = 0; i < kHeld; ++i) sum[i % 4] = fm_fma(a[i], b[i], sum[i % 4]);
  return lanes_sum<kLanes>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// One token on one column s: s = decay s + k d with d = beta (v - decay s . k); returns s . q.
//
// The new s . q is decay (s . q) + (k . q) d: both products need the old column only.
FM_DEV float delta_column(float* s, const float* k, const float* q, float v, DeltaGates g,
                          float product) {
  const float with_k = column_dot(s, k), with_q = column_dot(s, q);
  const float d = g.beta * fm_fma(-g.decay, with_k, v);
  FM_UNROLL
  for (int i = 0; i < kHeld; ++i) s[i] = fm_fma(k[i], d, g.decay * s[i]);
  return fm_fma(product, d, g.decay * with_q);
}

// rms_norm(o) * norm * silu(z), as rows; `o` are the DV outputs of a head of a token. One unit.
FM_DEV void finish_head(const float* o, UnitVector<DV> gate, const UnitVector<DV>& norm, float eps,
                        const RowsOut& out, long long first, bool has) {
  UnitVector<DV> v;
  v.load(o);
  FM_UNROLL
  for (int i = 0; i < v.kHeld; ++i) gate.v[i] = silu(gate.v[i]);
  rms_norm(v, norm, eps);
  v.scale(gate);
  put_vector(out, first, v, has);
}
