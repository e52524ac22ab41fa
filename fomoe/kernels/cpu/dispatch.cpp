#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace fomoe::cpu {
namespace {

// Bytes of a fixed sequence in which every half float is of the form 0x2cxx (about 0.07): d, m and
// dmin then are sane wherever a format puts them, and the quants still vary.
std::vector<uint8_t> test_bytes(size_t n) {
  std::vector<uint8_t> out(n);
  uint32_t state = 12345;
  for (size_t i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    out[i] = i % 2 ? 0x2c : static_cast<uint8_t>(state >> 24);
  }
  return out;
}

constexpr int64_t kCols = 512;

constexpr int kTokens = 3;

// One row against kTokens equal tokens: in float32, row by row and in panels.
std::vector<float> products(const Kernels& k, int type, const std::vector<uint8_t>& weights,
                            const std::vector<float>& x) {
  std::vector<int8_t> q(kTokens * kCols);
  std::vector<float> scale(kTokens * kCols / 32), out(3 * kTokens);
  static thread_local RowChunk chunks[kTokens * row_chunks(kCols)];
  alignas(64) static thread_local uint8_t scratch[scratch_bytes(kCols)];
  alignas(64) static thread_local uint8_t tiles[kTokens * tiled_bytes(kCols, 16)];
  k.quantize(x.data(), kTokens * kCols, q.data(), scale.data());
  Slice slice{weights.data(), 0, 0, 1, nullptr, kTokens, out.data(), 1};
  k.dot_f32[type](slice, x.data(), kCols, scratch);
  if (!k.dot_rows[type]) return out;
  const QuantShape shape = quant_shape(type);
  const QuantizedRows rows{q.data(), scale.data(), kCols};
  slice.out += kTokens;
  k.fill_rows[type](rows, 0, kTokens, chunks);
  k.dot_rows[type](slice, chunks, kCols);
  k.tile_tokens(rows, nullptr, kTokens, shape, tiles);
  slice.out += kTokens;
  k.dot_panels[type](slice, tiles, kCols, scratch);
  return out;
}

// The best set whose results are those of the scalar set, and what was found wrong with better
// ones.
struct Choice {
  std::atomic<const Kernels*> kernels{scalar_kernels()};
  std::string problems;

  Choice() {
    for (const Kernels* k : {avx512vnni_kernels(), avx2_kernels()}) {
      if (!k) continue;
      const std::string problem = self_test(*k);
      if (problem.empty()) {
        kernels = k;
        return;
      }
      problems += (problems.empty() ? "" : "; ") + problem;
    }
  }
};

Choice& choice() {
  static Choice only;
  return only;
}

}  // namespace

const Kernels& kernels() { return *choice().kernels.load(std::memory_order_relaxed); }

void use_isa(const std::string& name) {
  for (const Kernels* k : {scalar_kernels(), avx2_kernels(), avx512vnni_kernels()})
    if (k && name == k->name) {
      choice().kernels.store(k);
      return;
    }
  throw std::invalid_argument("instruction set '" + name +
                              "' is not one of scalar, avx2, avx512vnni, or this machine lacks it");
}

std::string isa_report() {
  const std::string name = kernels().name;
  return choice().problems.empty() ? name : name + " (" + choice().problems + ")";
}

std::string self_test(const Kernels& chosen) {
  std::vector<float> x(kTokens * kCols);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>((i * 37) % 101) * 0.04f - 2.0f;
  for (int type = 0; type < kTypeCount; ++type) {
    const TypeShape shape = type_shape(type);
    if (!shape.elements) continue;
    const auto weights = test_bytes(static_cast<size_t>(kCols / shape.elements * shape.bytes));
    const auto expected = products(*scalar_kernels(), type, weights, x);
    const auto found = products(chosen, type, weights, x);
    for (size_t i = 0; i < found.size(); ++i)
      if (std::memcmp(&expected[i], &found[i], sizeof(float)) != 0)
        return std::string(chosen.name) + " and scalar kernels differ for weight type " +
               std::to_string(type) + ": product " + std::to_string(i) + " is " +
               std::to_string(found[i]) + " instead of " + std::to_string(expected[i]);
  }
  return {};
}

}  // namespace fomoe::cpu
