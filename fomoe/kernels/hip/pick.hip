// The largest of the logits and the logarithm of the sum of their exponentials, in one launch.
#include "choose.h"
#include "last.h"
#include "unit.h"

constexpr int kWaves = THREADS / FM_WAVE;

// What is known of some logits: the key of the largest and the sum of exp(logit - largest).
struct Peak {
  choosing::Key key;
  float mass;
};

struct Largest {
  int id;
  float logit, log_sum;
};

FM_DEV Peak join(const Peak& a, const Peak& b) {
  const Peak &high = a.key >= b.key ? a : b, &low = a.key >= b.key ? b : a;
  if (!low.key) return high;
  const float factor = fm_exp(choosing::score_of(low.key) - choosing::score_of(high.key));
  return {high.key, fm_fma(low.mass, factor, high.mass)};
}

FM_DEV Peak of_wave(Peak peak) {
  FM_UNROLL
  for (int mask = FM_WAVE / 2; mask; mask /= 2) {
    const unsigned low = fm_wave_xor((unsigned)peak.key, mask);
    const unsigned high = fm_wave_xor((unsigned)(peak.key >> 32), mask);
    const Peak other = {(choosing::Key)high << 32 | low, fm_wave_xor(peak.mass, mask)};
    peak = join(peak, other);
  }
  return peak;
}

// Of the whole group, in thread 0. `peaks` is shared memory.
FM_DEV Peak of_group(Peak peak, Peak* peaks) {
  peak = of_wave(peak);
  if (fm_lane() == 0) peaks[threadIdx.x / FM_WAVE] = peak;
  fm_barrier();
  for (int i = 0; threadIdx.x == 0 && i < kWaves; ++i) peak = i ? join(peak, peaks[i]) : peaks[0];
  return peak;
}

// In the first pass the largest is found, then one exponential per logit is added.
FM_DEV Peak of_range(const float* logits, int begin, int end) {
  Peak peak = {0, 0.0f};
  for (int i = begin + threadIdx.x; i < end; i += THREADS) {
    const choosing::Key key = choosing::key_of(logits[i], i);
    peak.key = key > peak.key ? key : peak.key;
  }
  const float top = choosing::score_of(peak.key);
  for (int i = begin + threadIdx.x; i < end; i += THREADS) peak.mass += fm_exp(logits[i] - top);
  return peak;
}

FM_KERNEL(THREADS)
void largest(const float* logits, int n, Peak* parts, unsigned* finished, Largest* out) {
  FM_SHARED Peak peaks[kWaves];
  FM_SHARED int flag;
  const int groups = gridDim.x, each = (n + groups - 1) / groups, begin = (int)blockIdx.x * each;
  const int end = begin + each < n ? begin + each : n;
  const Peak mine = of_group(of_range(logits, begin, end), peaks);
  if (threadIdx.x == 0) parts[blockIdx.x] = mine;
  if (!is_last_group(finished, groups, &flag)) return;
  Peak all = {0, 0.0f};
  for (int i = threadIdx.x; i < groups; i += THREADS) all = join(all, parts[i]);
  all = of_group(all, peaks);
  if (threadIdx.x) return;
  const float top = choosing::score_of(all.key);
  *out = {choosing::id_of(all.key), top, top + fm_log(all.mass)};
}
