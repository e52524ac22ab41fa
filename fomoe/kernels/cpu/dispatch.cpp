#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace fomoe::cpu {
namespace {

const Kernels* best() {
  if (const Kernels* k = avx512vnni_kernels()) return k;
  if (const Kernels* k = avx2_kernels()) return k;
  return scalar_kernels();
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{best()};
  return table;
}

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

std::vector<float> product(const Kernels& k, int type, const std::vector<uint8_t>& weights,
                           const std::vector<float>& x) {
  std::vector<int8_t> q(kCols);
  std::vector<float> scale(kCols / 32), sums(kCols / 16), out(2);
  alignas(64) static thread_local uint8_t scratch[scratch_bytes(kCols)];
  k.quantize(x.data(), kCols, q.data(), scale.data());
  const int group = static_cast<QType>(type) == QType::Q2_K ? 16 : 32;
  k.group_sums(q.data(), scale.data(), kCols, group, sums.data());
  const Slice slice{weights.data(), 0, 0, 1, nullptr, 1, out.data(), 1};
  k.dot_f32[type](slice, x.data(), kCols, scratch);
  Slice second = slice;
  second.out = out.data() + 1;
  if (k.dot_q8[type])
    k.dot_q8[type](second, {q.data(), scale.data(), sums.data(), kCols, kCols / 32, kCols / group},
                   scratch);
  return out;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

void use_isa(const std::string& name) {
  for (const Kernels* k : {scalar_kernels(), avx2_kernels(), avx512vnni_kernels()})
    if (k && name == k->name) {
      current().store(k);
      return;
    }
  throw std::invalid_argument("instruction set '" + name +
                              "' is not one of scalar, avx2, avx512vnni, or this machine lacks it");
}

std::string self_test(const Kernels& chosen) {
  std::vector<float> x(kCols);
  for (int64_t i = 0; i < kCols; ++i) x[i] = static_cast<float>((i * 37) % 101 - 50) * 0.04f;
  for (int type = 0; type < kTypeCount; ++type) {
    const TypeShape shape = type_shape(type);
    if (!shape.elements) continue;
    const auto weights = test_bytes(static_cast<size_t>(kCols / shape.elements * shape.bytes));
    const auto expected = product(*scalar_kernels(), type, weights, x);
    const auto found = product(chosen, type, weights, x);
    if (std::memcmp(expected.data(), found.data(), 2 * sizeof(float)) != 0)
      return std::string(chosen.name) + " and scalar kernels differ for weight type " +
             std::to_string(type) + ": " + std::to_string(found[0]) + ", " +
             std::to_string(found[1]) + " instead of " + std::to_string(expected[0]) + ", " +
             std::to_string(expected[1]);
  }
  return {};
}

}  // namespace fomoe::cpu
