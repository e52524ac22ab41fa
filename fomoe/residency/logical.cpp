#include "logical.h"

#include <algorithm>
#include <cstring>

#include "fomoe/native/view.h"

namespace fomoe::residency {
namespace {

constexpr uint32_t kOnce = 1u << 16;       // one wish, in the counts of lfru
constexpr int kDecayBits = 36;             // of the tables; counts stay below 2^27
constexpr float kMassUnit = 1048576.0f;    // of the moving average

bool has(const int32_t* ids, int64_t n, int32_t expert) {
  return std::find(ids, ids + n, expert) != ids + n;
}

}  // namespace

void LogicalCaches::weigh(int64_t cell, const float* probabilities) const {
  uint32_t* const w = weight(cell);
  for (int64_t e = 0; e < shape_.experts; ++e)
    w[e] += uint32_t(int32_t(probabilities[e] * kMassUnit)) - (w[e] >> rules_.shift);
}

void LogicalCaches::weigh(int64_t cell, const int32_t* ids, const float* probabilities,
                          int64_t count) const {
  uint32_t* const w = weight(cell);
  for (int64_t e = 0; e < shape_.experts; ++e) w[e] -= w[e] >> rules_.shift;
  for (int64_t i = 0; i < count; ++i) w[ids[i]] += uint32_t(int32_t(probabilities[i] * kMassUnit));
}

void LogicalCaches::want(int64_t cell, const int32_t* ids, int64_t k) const {
  if (rules_.eviction != Eviction::kLfru) return;
  const int64_t now = a_.tokens[cell];
  uint32_t* const w = weight(cell);
  int32_t* const l = last(cell);
  for (int64_t i = 0; i < k; ++i) {
    const int64_t age = std::min(now - l[ids[i]], a_.ages - 1);
    w[ids[i]] = uint32_t(w[ids[i]] * a_.decay[age] >> kDecayBits) + kOnce;
    l[ids[i]] = int32_t(now);
  }
}

void LogicalCaches::run(int64_t cell, const int32_t* ids, int64_t k, bool* read,
                        Scratch& scratch) const {
  const int64_t now = a_.tokens[cell];
  const bool* const here = resident(cell);
  int64_t coming = 0;
  for (int64_t i = 0; i < k; ++i) {
    read[i] = false;
    if (ids[i] < 0) continue;
    scratch.kept[ids[i]] = 1;
    if (rules_.eviction == Eviction::kLru) last(cell)[ids[i]] = int32_t(now);
    if (here[ids[i]]) continue;
    scratch.coming[coming++] = ids[i];
    read[i] = !take_off(cell, ids[i]);
  }
  if (coming) admit(cell, now, scratch, coming);
  for (int64_t i = 0; i < k; ++i)
    if (ids[i] >= 0) scratch.kept[ids[i]] = 0;
}

void LogicalCaches::ask_for(int64_t cell) const {
  const int64_t n = shape_.experts;
  fomoe::ask_for(resident(cell), n);
  fomoe::ask_for(weight(cell), n * int64_t(sizeof(uint32_t)));
  fomoe::ask_for(last(cell), n * int64_t(sizeof(int32_t)));
  fomoe::ask_for(a_.members + cell * shape_.capacity, shape_.capacity * int64_t(sizeof(int32_t)));
}

void LogicalCaches::fill(int64_t cell, const int32_t* wanted, const int32_t* ids, int64_t k,
                         int32_t* issued) const {
  int64_t count = 0;
  int64_t& credit = a_.credit[cell];
  credit += rules_.fill_count;
  if (rules_.fill_count)
    for (int64_t i = 0; i < k && credit >= rules_.fill_per; ++i) {
      if (has(ids, k, wanted[i]) || is_flying(cell, wanted[i])) continue;
      const int64_t at = cell * shape_.flights + a_.flying[cell]++;
      a_.flight[at] = wanted[i];
      a_.due[at] = a_.tokens[cell] + rules_.delay;
      issued[count++] = wanted[i];
      credit -= rules_.fill_per;
    }
  credit = std::min(credit, rules_.fill_per);
  counts(cell)[kBackground] += count;
  std::fill(issued + count, issued + k, -1);
}

void LogicalCaches::close(int64_t cell, const int32_t* ids, int64_t k, const float* price,
                          Scratch& scratch) const {
  const int64_t layer = cell % shape_.layers, token = a_.tokens[cell]++;
  uint64_t sum = 0;
  for (int64_t i = 0; i < k; ++i)
    if (ids[i] >= 0) sum += decision_word(token, layer, ids[i]);
  if (price) {
    uint32_t bits;
    std::memcpy(&bits, price, 4);
    sum += splitmix64(decision_word(token, layer, 0xFFFF) ^ bits);
  }
  a_.hash[cell / shape_.layers] += sum;
  if (a_.flying[cell]) land(cell, token + 1, scratch);
}

uint64_t LogicalCaches::worth(int64_t cell, int32_t expert, int64_t now) const {
  const int64_t at = cell * shape_.experts + expert;
  switch (rules_.eviction) {
    case Eviction::kLru:
      return uint64_t(int64_t(a_.last[at]) + (int64_t(1) << 32));  // seeds are below 0
    case Eviction::kLfru:
      return a_.weight[at] * a_.quotient[std::min(now - a_.last[at], a_.ages - 1)];
    case Eviction::kMass:
      break;
  }
  return a_.weight[at];
}

// Makes scratch.coming resident; the least worthy leave, never one that is marked as kept.
void LogicalCaches::admit(int64_t cell, int64_t now, Scratch& scratch, int64_t coming) const {
  bool* const here = a_.resident + cell * shape_.experts;
  int32_t* const members = a_.members + cell * shape_.capacity;
  int32_t& held = a_.held[cell];
  const int64_t leaving = std::max<int64_t>(held + coming - shape_.capacity, 0);
  if (leaving) {
    auto& order = scratch.order;
    order.clear();
    for (int64_t i = 0; i < held; ++i)
      if (!scratch.kept[members[i]]) order.push_back({worth(cell, members[i], now), members[i]});
    std::partial_sort(order.begin(), order.begin() + leaving, order.end());
    for (int64_t i = 0; i < leaving; ++i) here[order[i].expert] = false;
    held = int32_t(std::remove_if(members, members + held, [&](int32_t e) { return !here[e]; }) -
                   members);
  }
  for (int64_t i = 0; i < coming; ++i) {
    here[scratch.coming[i]] = true;
    members[held++] = scratch.coming[i];
  }
}

bool LogicalCaches::is_flying(int64_t cell, int32_t expert) const {
  return has(a_.flight + cell * shape_.flights, a_.flying[cell], expert);
}

// Removes an expert from those under way; false if it is not among them.
bool LogicalCaches::take_off(int64_t cell, int32_t expert) const {
  int32_t* const first = a_.flight + cell * shape_.flights;
  int64_t* const due = a_.due + cell * shape_.flights;
  const int64_t n = a_.flying[cell], at = std::find(first, first + n, expert) - first;
  if (at == n) return false;
  std::copy(first + at + 1, first + n, first + at);
  std::copy(due + at + 1, due + n, due + at);
  --a_.flying[cell];
  return true;
}

// What is due by the token `now` becomes resident, as one event.
void LogicalCaches::land(int64_t cell, int64_t now, Scratch& scratch) const {
  const int32_t* const first = a_.flight + cell * shape_.flights;
  const int64_t* const due = a_.due + cell * shape_.flights;
  int64_t coming = 0;
  while (coming < a_.flying[cell] && due[coming] <= now) {
    scratch.coming[coming] = first[coming];
    ++coming;
  }
  if (!coming) return;
  for (int64_t i = 0; i < coming; ++i)
    if (rules_.eviction == Eviction::kLru) last(cell)[scratch.coming[i]] = int32_t(now);
  admit(cell, now, scratch, coming);
  for (int64_t i = 0; i < coming; ++i) take_off(cell, scratch.coming[i]);
}

}  // namespace fomoe::residency
