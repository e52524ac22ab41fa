#include "losses.h"

#include <algorithm>
#include <cmath>

namespace fomoe::sim {

Losses losses_of(const int32_t* ids, const float* p, int64_t c, int64_t k, const int32_t* run,
                 const float* weights) {
  double exact = 0.0, kept = 0.0;
  for (int64_t i = 0; i < k; ++i) exact += p[i];
  Losses l{};
  for (int64_t i = 0; i < k; ++i) {
    if (std::find(run, run + k, ids[i]) != run + k) continue;
    const double w = p[i] / exact;
    l.left_out += w;
    l.squares += w * w;
    l.distance += w * w;
  }
  for (int64_t j = 0; j < k; ++j) {
    if (run[j] < 0) continue;
    const int64_t at = std::find(ids, ids + c, run[j]) - ids;
    const double pj = at < c ? double(p[at]) : 0.0;
    const double miss = double(weights[j]) - (at < k ? pj / exact : 0.0);
    kept += pj;
    l.distance += miss * miss;
  }
  l.mass = 1.0 - kept / exact;
  l.router_kl = -std::log(kept / exact);
  return l;
}

}  // namespace fomoe::sim
