// What a choice of experts loses against the exact router's; losses.py has the formulas.
#pragma once

#include <cstdint>

namespace fomoe::sim {

struct Losses {
  double mass, left_out, squares, distance, router_kl;
};

// A row's candidates ids and p [c], best first, of which the router takes k; what runs, [k], id -1
// for what is dropped. An expert that is no candidate counts as of probability 0.
Losses losses_of(const int32_t* ids, const float* p, int64_t c, int64_t k, const int32_t* run,
                 const float* weights);

}  // namespace fomoe::sim
