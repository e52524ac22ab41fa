// The largest of the logits and the logarithm of the sum of their exponentials, in one launch.
#include "choose.h"
#include "last.h"

// What is known of some logits: the key of the largest, itself, the sum of exp(logit - largest).
// A key of 0 stands for no logits.
struct Peak {
  choosing::Key key;
  float top, mass;
};

struct Largest {
  int id;
  float logit, log_sum;
};

FM_DEV Peak join(const Peak& a, const Peak& b) {
  const bool first = a.key >= b.key;
  const float top = first ? a.top : b.top, mass = first ? a.mass : b.mass;
  const float less_top = first ? b.top : a.top, less = first ? b.mass : a.mass;
  const float factor = (first ? b.key : a.key) ? fm_exp(less_top - top) : 0.0f;
  return {first ? a.key : b.key, top, fm_fma(less, factor, mass)};
}

// Of the whole group. `peaks` [THREADS] is shared memory.
FM_DEV Peak of_group(Peak peak, Peak* peaks) {
  const int thread = threadIdx.x;
  peaks[thread] = peak;
  for (int half = THREADS / 2; half; half /= 2) {
    fm_barrier();
    if (thread < half) peaks[thread] = join(peaks[thread], peaks[thread + half]);
  }
  fm_barrier();
  return peaks[0];
}

// In the first pass the largest is found, then one exponential per logit is added.
FM_DEV Peak of_range(const float* logits, int begin, int end) {
  Peak peak = {0, 0.0f, 0.0f};
  for (int i = begin + threadIdx.x; i < end; i += THREADS) {
    const float logit = logits[i];
    const choosing::Key key = choosing::key_of(logit, i);
    peak.top = key > peak.key ? logit : peak.top;
    peak.key = key > peak.key ? key : peak.key;
  }
  for (int i = begin + threadIdx.x; i < end; i += THREADS) peak.mass += fm_exp(logits[i] - peak.top);
  return peak;
}

FM_KERNEL(THREADS)
void largest(const float* logits, int n, Peak* parts, unsigned* finished, Largest* out) {
  FM_SHARED Peak peaks[THREADS];
  FM_SHARED int flag;
  const int groups = gridDim.x, each = (n + groups - 1) / groups, begin = (int)blockIdx.x * each;
  const int end = begin + each < n ? begin + each : n;
  const Peak mine = of_group(of_range(logits, begin, end), peaks);
  if (threadIdx.x == 0) parts[blockIdx.x] = mine;
  if (!is_last_group(finished, groups, &flag)) return;
  Peak all = {0, 0.0f, 0.0f};
  for (int i = threadIdx.x; i < groups; i += THREADS) all = join(all, parts[i]);
  all = of_group(all, peaks);
  if (threadIdx.x) return;
  *out = {choosing::id_of(all.key), all.top, all.top + fm_log(all.mass)};
}
