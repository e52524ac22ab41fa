// From the experts of each token, ids [T][TOP_K], to pairs (token, expert) sorted by expert and then
// by token, and to tiles of at most TILE_TOKENS pairs of one expert. Tokens are taken in chunks of
// 64: a bit per token and expert says who takes whom, so that a pair's place is a count of bits.
#include "step.h"

constexpr int kChunk = 64;
static_assert(THREADS >= EXPERTS && (THREADS & (THREADS - 1)) == 0, "a thread per expert");

struct PairLists {
    unsigned* before;    // [chunks][EXPERTS]: pairs of the expert in the chunk, then before it
    unsigned* finished;  // chunks that have counted; 0 between launches
    unsigned* tile_count;
    fm_u2* tiles;   // (expert, first pair)
    int* starts;    // [EXPERTS + 1]
    int* token_of;  // [T * TOP_K]: each pair's token
    int* place;     // [T][TOP_K]: where a token's pair is
};

FM_DEV int chunk_tokens(const fm_step* step) {
    const int left = step->tokens - int(blockIdx.x) * kChunk;
    return left < kChunk ? left : kChunk;
}

// Sets bit t of masks [EXPERTS][2] where token t of this chunk takes the expert.
FM_DEV void mark_tokens(const int* ids, int tokens, unsigned* masks) {
    for (int i = fm_thread(); i < 2 * EXPERTS; i += THREADS) masks[i] = 0;
    fm_barrier();
    for (int i = fm_thread(); i < tokens * TOP_K; i += THREADS) {
        const int token = i / TOP_K;
        fm_atomic_add(masks + 2 * ids[i] + token / 32, 1u << token % 32);
    }
    fm_barrier();
}

FM_DEV unsigned count_bits(unsigned x) {
    x -= x >> 1 & 0x55555555u;
    x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
    return ((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24;
}

// The sum of the values of lower threads; all threads of the group come here.
FM_DEV unsigned sum_before(unsigned value, unsigned* sums) {
    sums[fm_thread()] = value;
    fm_barrier();
    for (int far = 1; far < THREADS; far *= 2) {
        const unsigned other = fm_thread() >= far ? sums[fm_thread() - far] : 0;
        fm_barrier();
        sums[fm_thread()] += other;
        fm_barrier();
    }
    const unsigned before = sums[fm_thread()] - value;
    fm_barrier();
    return before;
}

// Whether this group is the last of `groups` to come here; then it sees what the others wrote.
FM_DEV bool comes_last(unsigned* finished, unsigned groups, unsigned* arrived) {
    fm_fence();
    fm_barrier();
    if (fm_thread() == 0) *arrived = fm_atomic_add(finished, 1) + 1;
    fm_barrier();
    fm_fence();
    return *arrived == groups;
}

FM_DEV unsigned sum_over_chunks(volatile unsigned* before, int expert, int chunks) {
    unsigned sum = 0;
    for (int chunk = 0; chunk < chunks; chunk++) sum += before[chunk * EXPERTS + expert];
    return sum;
}

FM_DEV void write_lists(const PairLists& lists, int chunks, unsigned* sums) {
    const int expert = fm_thread();
    const bool is_expert = expert < EXPERTS;
    const unsigned pairs = is_expert ? sum_over_chunks(lists.before, expert, chunks) : 0;
    const unsigned tiles = (pairs + TILE_TOKENS - 1) / TILE_TOKENS;
    unsigned start = sum_before(pairs, sums);
    const unsigned tile = sum_before(tiles, sums);
    if (!is_expert) return;
    if (expert == 0) *lists.finished = 0;
    if (expert == EXPERTS - 1) lists.starts[EXPERTS] = int(start + pairs), *lists.tile_count = tile + tiles;
    lists.starts[expert] = int(start);
    for (unsigned i = 0; i < tiles; i++) lists.tiles[tile + i] = fm_u2{unsigned(expert), start + i * TILE_TOKENS};
    volatile unsigned* const before = lists.before;
    for (int chunk = 0; chunk < chunks; chunk++) {
        const unsigned count = before[chunk * EXPERTS + expert];
        before[chunk * EXPERTS + expert] = start;
        start += count;
    }
}

FM_KERNEL(THREADS) void count_pairs(const fm_step* step, const int* ids, PairLists lists) {
    FM_SHARED unsigned masks[2 * EXPERTS], sums[THREADS], arrived;
    const int tokens = chunk_tokens(step), chunk = blockIdx.x;
    if (tokens <= 0) return;
    mark_tokens(ids + chunk * kChunk * TOP_K, tokens, masks);
    for (int e = fm_thread(); e < EXPERTS; e += THREADS)
        lists.before[chunk * EXPERTS + e] = count_bits(masks[2 * e]) + count_bits(masks[2 * e + 1]);
    const int chunks = (step->tokens + kChunk - 1) / kChunk;
    if (comes_last(lists.finished, chunks, &arrived)) write_lists(lists, chunks, sums);
}

FM_KERNEL(THREADS) void place_pairs(const fm_step* step, const int* ids, PairLists lists) {
    FM_SHARED unsigned masks[2 * EXPERTS];
    const int tokens = chunk_tokens(step), chunk = blockIdx.x, first = chunk * kChunk * TOP_K;
    if (tokens <= 0) return;
    mark_tokens(ids + first, tokens, masks);
    for (int i = fm_thread(); i < tokens * TOP_K; i += THREADS) {
        const int expert = ids[first + i], token = i / TOP_K;
        const unsigned below = (1u << token % 32) - 1, *mask = masks + 2 * expert;
        unsigned pair = lists.before[chunk * EXPERTS + expert];
        pair += token < 32 ? count_bits(mask[0] & below) : count_bits(mask[0]) + count_bits(mask[1] & below);
        lists.place[first + i] = int(pair);
        lists.token_of[pair] = chunk * kChunk + token;
    }
}
