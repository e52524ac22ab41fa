// The largest of the logits and the logarithm of the sum of their exponentials, in one launch.
#include "choose.h"
#include "last.h"

constexpr int kWaves = THREADS / FM_WAVE;
constexpr int kAtOnce = 4;  // logits that a thread asks for at a time

// What is known of some logits: the key of the largest, and the sum of exp(logit - largest). A key
// of 0 stands for no logits.
struct Peak {
  choosing::Key key;
  float mass;
  // The sum with respect to another largest one.
  FM_DEV float mass_for(float top) const {
    return key ? mass * fm_exp(choosing::score_of(key) - top) : 0.0f;
  }
};

struct Largest {
  int id;
  float logit, log_sum;
};

FM_DEV choosing::Key wave_max(choosing::Key key) {
  FM_UNROLL
  for (int mask = 1; mask < FM_WAVE; mask *= 2) {
    const unsigned high = fm_wave_xor((unsigned)(key >> 32), mask);
    const unsigned low = fm_wave_xor((unsigned)key, mask);
    const choosing::Key other = (choosing::Key)high << 32 | low;
    key = other > key ? other : key;
  }
  return key;
}

// Shared memory of a group: what each wave has.
struct Shares {
  choosing::Key keys[kWaves];
  float masses[kWaves];
};

// The peak of the whole group; all threads get it.
FM_DEV Peak of_group(const Peak& mine, Shares& shares) {
  const int wave = (int)threadIdx.x / FM_WAVE;
  Peak all = {wave_max(mine.key), 0.0f};
  if (fm_lane() == 0) shares.keys[wave] = all.key;
  fm_barrier();
  for (int i = 0; i < kWaves; ++i) all.key = shares.keys[i] > all.key ? shares.keys[i] : all.key;
  const float mass = fm_wave_sum(mine.mass_for(choosing::score_of(all.key)));
  if (fm_lane() == 0) shares.masses[wave] = mass;
  fm_barrier();
  for (int i = 0; i < kWaves; ++i) all.mass += shares.masses[i];
  return all;
}

// The peak of this thread's logits in [begin, end).
FM_DEV Peak of_range(const float* logits, int begin, int end) {
  Peak peak = {0, 0.0f};
  for (int from = begin + threadIdx.x; from < end; from += kAtOnce * THREADS) {
    float v[kAtOnce];
    FM_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = from + j * THREADS;
      v[j] = logits[i < end ? i : from];
    }
    choosing::Key key = peak.key;
    FM_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = from + j * THREADS;
      const choosing::Key other = choosing::key_of(v[j], i < end ? i : from);
      key = other > key ? other : key;
    }
    const float top = choosing::score_of(key);
    float mass = peak.mass_for(top);
    FM_UNROLL
    for (int j = 0; j < kAtOnce; ++j) mass += from + j * THREADS < end ? fm_exp(v[j] - top) : 0.0f;
    peak = {key, mass};
  }
  return peak;
}

// Each group has a share of the logits; the last to finish joins the groups' peaks.
FM_KERNEL(THREADS)
void largest(const float* logits, int n, Peak* parts, unsigned* finished, Largest* out) {
  FM_SHARED Shares shares;
  FM_SHARED int flag;
  fm_release_next();
  const int groups = gridDim.x, each = (n + groups - 1) / groups, begin = (int)blockIdx.x * each;
  const int end = begin + each < n ? begin + each : n;
  fm_wait_before();
  const Peak mine = of_group(of_range(logits, begin, end), shares);
  if (threadIdx.x == 0) parts[blockIdx.x] = mine;
  if (!is_last_group(finished, groups, &flag)) return;
  Peak some = {0, 0.0f};
  for (int i = threadIdx.x; i < groups; i += THREADS) {
    const Peak part = parts[i];
    const choosing::Key key = part.key > some.key ? part.key : some.key;
    const float top = choosing::score_of(key);
    some = {key, some.mass_for(top) + part.mass_for(top)};
  }
  const Peak all = of_group(some, shares);
  if (threadIdx.x) return;
  const float top = choosing::score_of(all.key);
  *out = {choosing::id_of(all.key), top, top + fm_log(all.mass)};
}
