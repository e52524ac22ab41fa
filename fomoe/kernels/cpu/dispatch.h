// The table of kernels in use: the best set that this processor has and that passes the self-test,
// unless a test asks for another.
#pragma once

#include <string>

#include "table.h"

namespace fomoe::cpu {

const Kernels& kernels();
// Throws std::invalid_argument where the machine lacks the set.
void use_isa(const std::string& name);
// The name of the set in use, and in brackets why a better one is not, if one failed the self-test.
std::string isa_report();
// Runs every weight type of the chosen set against the scalar set on fixed data and returns the
// first disagreement, or an empty string.
std::string self_test(const Kernels& chosen);

}  // namespace fomoe::cpu
