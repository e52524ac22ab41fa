// Causal attention over a cache: tiles of tokens against blocks of positions.
//
// The partial softmaxes of a token's blocks are folded in ascending order, whoever made them.
#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "product.h"

namespace fomoe::cpu {
namespace {

constexpr int64_t kTileRows = 64;    // queries that share the unpacked keys and values of a block
constexpr int64_t kWaveTokens = 64;  // blocks times tokens that wait in memory to be folded

class AttentionRun {
 public:
  AttentionRun(const float* q, int64_t tokens, int64_t heads, const Cache& cache, int64_t position0,
               float* out)
      : q_(q),
        out_(out),
        cache_(cache),
        tokens_(tokens),
        position0_(position0),
        group_(heads / cache.heads) {}

  void run() const {
    const int64_t tile = std::clamp<int64_t>(kTileRows / group_, 1, tokens_);
    const int64_t wanted = 2 * thread_count();
    if (ceil_div(tokens_, tile) * cache_.heads >= wanted) return by_tiles(tile);
    if (tokens_ > 1 && blocks(tokens_ - 1) * cache_.heads < wanted)
      return by_tiles(std::max<int64_t>(1, tokens_ * cache_.heads / wanted));
    for (int64_t t = 0; t < tokens_; t += tile) by_blocks({t, std::min(tile, tokens_ - t)});
  }

 private:
  struct Tile {
    int64_t first, tokens;
    int64_t last() const { return first + tokens - 1; }
  };

  // Every (tile, kv head) alone, its blocks folded as they come; the longest contexts first.
  void by_tiles(int64_t size) const {
    const int64_t tiles = ceil_div(tokens_, size);
    parallel(tiles * cache_.heads, work(), [&](int64_t item) {
      const int64_t t = (tiles - 1 - item / cache_.heads) * size, head = item % cache_.heads;
      const Tile tile{t, std::min(size, tokens_ - t)};
      float* const memory = fomoe::cpu::work<float>(Work::Partial, 2 * part_size(tile));
      const SoftmaxPart whole = part_at(memory, 0, tile), part = part_at(memory, 1, tile);
      block(tile, head, 0, whole);
      for (int64_t b = 1; b < blocks(tile.last()); ++b) {
        block(tile, head, b, part);
        fold(tile, b, part, whole);
      }
      finish(tile, head, whole);
    });
  }

  // One tile: blocks side by side, a wave of them at a time, then folded in order.
  void by_blocks(const Tile& tile) const {
    const int64_t all = blocks(tile.last()), wave = std::max<int64_t>(1, kWaveTokens / tile.tokens);
    float* const memory =
        fomoe::cpu::work<float>(Work::Partial, (wave + 1) * cache_.heads * part_size(tile));
    for (int64_t first = 0; first < all; first += wave) {
      const int64_t count = std::min(wave, all - first);
      parallel(count * cache_.heads, work(), [&](int64_t item) {
        block(tile, item % cache_.heads, first + item / cache_.heads, part_at(memory, item, tile));
      });
      for (int64_t head = 0; head < cache_.heads; ++head) {
        const SoftmaxPart whole = part_at(memory, wave * cache_.heads + head, tile);
        for (int64_t b = 0; b < count; ++b) {
          const SoftmaxPart part = part_at(memory, b * cache_.heads + head, tile);
          if (first + b == 0)
            std::copy(part.top, part.top + part_size(tile), whole.top);
          else
            fold(tile, first + b, part, whole);
        }
        if (first + count == all) finish(tile, head, whole);
      }
    }
  }

  int64_t visible(int64_t t) const { return position0_ + t + 1; }
  int64_t blocks(int64_t t) const { return ceil_div(visible(t), kPositions); }
  int64_t work() const {
    return tokens_ * visible(tokens_ - 1) * cache_.heads * cache_.dim * (cache_.f16 ? 4 : 8);
  }
  // Where the queries and the outputs of a token and kv head begin.
  int64_t place(int64_t t, int64_t head) const {
    return (t * cache_.heads + head) * group_ * cache_.dim;
  }
  int64_t part_size(const Tile& tile) const { return tile.tokens * group_ * (cache_.dim + 2); }
  SoftmaxPart part_at(float* memory, int64_t i, const Tile& tile) const {
    float* const p = memory + i * part_size(tile);
    return from({p, p + tile.tokens * group_, p + 2 * tile.tokens * group_}, 0);
  }
  SoftmaxPart from(const SoftmaxPart& s, int64_t row) const {
    return {s.top + row, s.mass + row, s.out + row * cache_.dim};
  }
  CacheHead head_of(void* data, int64_t position, int64_t head) const {
    const int64_t offset = (position * cache_.heads + head) * cache_.dim;
    return {static_cast<char*>(data) + offset * (cache_.f16 ? 2 : 4), cache_.heads * cache_.dim,
            cache_.f16};
  }

  void block(const Tile& tile, int64_t head, int64_t b, const SoftmaxPart& s) const {
    const int64_t begin = b * kPositions, stride = cache_.heads * group_ * cache_.dim;
    float* const memory =
        fomoe::cpu::work<float>(Work::Softmax, attend_floats(tile.tokens * group_, cache_.dim));
    kernels().attend({q_ + place(tile.first, head), stride, tile.tokens, group_, cache_.dim,
                      head_of(cache_.k, begin, head), head_of(cache_.v, begin, head),
                      visible(tile.first) - begin},
                     memory, s);
  }
  // Without the first tokens of a tile that see nothing of block b.
  void fold(const Tile& tile, int64_t b, const SoftmaxPart& part, const SoftmaxPart& whole) const {
    const int64_t blind = std::max<int64_t>(0, b * kPositions + 1 - visible(tile.first)) * group_;
    kernels().fold(tile.tokens * group_ - blind, cache_.dim, from(part, blind), from(whole, blind));
  }
  void finish(const Tile& tile, int64_t head, const SoftmaxPart& whole) const {
    for (int64_t r = 0; r < tile.tokens * group_; ++r) {
      float* const out = out_ + place(tile.first + r / group_, head) + r % group_ * cache_.dim;
      std::memcpy(out, whole.out + r * cache_.dim, static_cast<size_t>(cache_.dim) * sizeof(float));
      kernels().scale(out, 1.0f / whole.mass[r], cache_.dim);
    }
  }

  const float* q_;
  float* out_;
  const Cache cache_;
  int64_t tokens_, position0_, group_;
};

}  // namespace

void attention(const float* q, int64_t tokens, int64_t heads, const Cache& cache, int64_t position0,
               float* out) {
  AttentionRun(q, tokens, heads, cache, position0, out).run();
}

}  // namespace fomoe::cpu
