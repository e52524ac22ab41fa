"""Grouping, experts over a chunk and their weighted sums against NumPy, on the CPU stand-in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from support.emulated_gpu import gpu_under_test
from support.gpu_memory import Memory
from support.random_blocks import random_matrix

from fomoe.kernels import reference
from fomoe.kernels.gpu import prompt_experts
from fomoe.kernels.gpu.matrices import ExpertLayout
from fomoe.kernels.gpu.prompt import Chunk
from fomoe.kernels.gpu.prompt_tiles import Tile

TILE = Tile(64, 16, 128)


@pytest.fixture(params=[32, 64], ids=["wave32", "wave64"])
def gpu(request):
    with gpu_under_test(request.param, seed=13) as gpu:
        yield gpu


def ids_of(rng, tokens, experts, top_k):
    """Ascending ids with a few favourites, and experts that nobody takes."""
    scores = rng.random((tokens, experts)) - 0.5 * (np.arange(experts) < 3)
    scores[:, experts // 2] = 2
    return np.sort(np.argsort(scores, axis=1)[:, :top_k], axis=1).astype(np.int32)


def sorted_pairs(ids):
    """Tokens of the pairs in the order of (expert, token), and where each (token, k) is."""
    tokens = np.repeat(np.arange(len(ids)), ids.shape[1])
    order = np.lexsort((tokens, ids.reshape(-1)))
    place = np.empty(ids.size, np.int32)
    place[order] = np.arange(ids.size)
    return tokens[order], place.reshape(ids.shape)


@dataclass
class Grouped:
    pairs: prompt_experts.Pairs
    chunk: Chunk
    starts: Any
    token_of: Any
    place: Any


def group(gpu, memory, shape, ids, most, int8=True, tile=TILE):
    chunk = Chunk(memory.step(len(ids)), most, int8, tile)
    pairs = prompt_experts.pair_buffers(gpu, chunk, shape)
    for launch in prompt_experts.group_pairs(gpu, chunk, shape, memory.put(ids), pairs):
        gpu.launch(launch)
    starts = gpu.download(pairs.lists.starts, np.int32, shape.count + 1)
    token_of = gpu.download(pairs.lists.token_of, np.int32, ids.size)
    return Grouped(
        pairs, chunk, starts, token_of, gpu.download(pairs.lists.place, np.int32, ids.shape)
    )


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 1), (70, 37, 5), (193, 96, 8)])
def test_pairs_are_sorted_by_expert_then_token(gpu, tokens, experts, top_k):
    rng, memory = np.random.default_rng(tokens), Memory(gpu)
    shape = prompt_experts.Experts(ExpertLayout((12, 12, 12), 256, 256), experts, top_k)
    for _ in range(2):  # the second time over what the first has left
        ids = ids_of(rng, tokens, experts, top_k)
        found = group(gpu, memory, shape, ids, tokens + 70)
        token_of, place = sorted_pairs(ids)
        counts = np.bincount(ids.reshape(-1), minlength=experts)
        np.testing.assert_array_equal(found.starts, np.concatenate([[0], np.cumsum(counts)]))
        np.testing.assert_array_equal(found.token_of, token_of)
        np.testing.assert_array_equal(found.place, place)
        tiles = [
            (e, found.starts[e] + i)
            for e in range(experts)
            for i in range(0, counts[e], TILE.tokens)
        ]
        count = int(gpu.download(found.pairs.lists.tile_count, np.uint32, 1)[0])
        assert count == len(tiles) <= found.pairs.most_tiles
        np.testing.assert_array_equal(
            gpu.download(found.pairs.lists.tiles, np.uint32, (count, 2)), tiles
        )


def test_grouping_twice_with_the_same_memory_gives_the_same(gpu):
    memory, rng = Memory(gpu), np.random.default_rng(1)
    shape = prompt_experts.Experts(ExpertLayout((12, 12, 12), 256, 256), 12, 3)
    ids = ids_of(rng, 130, 12, 3)
    chunk = Chunk(memory.step(130), 130, True, TILE)
    pairs = prompt_experts.pair_buffers(gpu, chunk, shape)
    launches = prompt_experts.group_pairs(gpu, chunk, shape, memory.put(ids), pairs)
    found = []
    for _ in range(2):
        for launch in launches:
            gpu.launch(launch)
        found.append(gpu.download(pairs.lists.token_of, np.int32, ids.size).tobytes())
    assert found[0] == found[1] == sorted_pairs(ids)[0].astype(np.int32).tobytes()


def pool_of(rng, memory, kinds, hidden, width, count):
    """Experts and the table of their addresses, each matrix at a place of its own."""
    pool, table = [], np.zeros((3, count), np.uint64)
    sizes = ((width, hidden), (width, hidden), (hidden, width))
    for e in range(count):
        blocks = []
        for j, (kind, (rows, cols)) in enumerate(zip(kinds, sizes, strict=True)):
            matrix = random_matrix(rng, (rows, cols), 0.05, kind)
            blocks.append(np.ascontiguousarray(matrix).view(np.uint8).reshape(rows, -1))
            table[j, e] = memory.put(blocks[-1])
        pool.append(reference.Expert(*blocks, tuple(int(k) for k in kinds)))
    return pool, memory.put(table)


CASES = {
    "q4_k q6_k": ((Kind.Q4_K, Kind.Q4_K, Kind.Q6_K), 256, 256, TILE),
    "left out tiles": ((Kind.Q4_K, Kind.Q4_K, Kind.Q6_K), 256, 256, Tile(64, 64, 128)),
    "small blocks": ((Kind.Q5_0, Kind.Q8_0, Kind.Q8_0), 96, 64, TILE),
    "float activations": ((Kind.Q4_K, Kind.Q4_K, Kind.Q5_0), 256, 32, None),
    "float weights": ((Kind.F16, Kind.F16, Kind.F32), 64, 96, TILE),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_experts_of_a_chunk(gpu, case):
    kinds, hidden, width, tile = case
    rng, memory, tokens, count, top_k = np.random.default_rng(2), Memory(gpu), 21, 5, 3
    layout = ExpertLayout(tuple(int(k) for k in kinds), hidden, width)
    shape = prompt_experts.Experts(layout, count, top_k)
    pool, table = pool_of(rng, memory, kinds, hidden, width, count)
    ids, x = ids_of(rng, tokens, count, top_k), rng.standard_normal((tokens, hidden), np.float32)
    grouped = group(gpu, memory, shape, ids, tokens + 9, tile is not None, tile)

    hidden_rows = memory.empty_rows(ids.size, width)
    out = memory.put(np.zeros((ids.size, hidden), np.float32))
    rows = prompt_experts.PairRows(hidden_rows, out)
    chunk, pairs, h = grouped.chunk, grouped.pairs, memory.rows(x)
    for launch in prompt_experts.experts_chunk(gpu, chunk, shape, pairs, table, h, rows):
        gpu.launch(launch)

    found, inner = memory.take(out), [memory.take(address) for address in hidden_rows]
    check_experts(pool, grouped, x, inner, found)
    weights = rng.random(ids.shape, np.float32)
    check_combine(gpu, memory, grouped, shape, (weights, found, out))


def check_experts(pool, grouped, x, inner, found):
    """Both products against float64, the second from the rows that the first has written."""
    values, q, scales = inner
    is_int8 = grouped.chunk.is_int8(*pool[0].qtypes)
    rounded = reference.quantize_activations(x)
    largest = [0.0, 0.0]
    worst = [0.0, 0.0]
    for e, expert in enumerate(pool):
        pairs = slice(int(grouped.starts[e]), int(grouped.starts[e + 1]))
        if pairs.start == pairs.stop:
            continue
        rows, (gate_type, up_type, down_type) = grouped.token_of[pairs], expert.qtypes
        if is_int8:
            taken = [part[rows] for part in rounded]
            gate = reference.matmul_q8(gate_type, expert.gate, *taken)
            up = reference.matmul_q8(up_type, expert.up, *taken)
            d = scales[pairs, :, 0]
            restored = reference.restore_activations(q[pairs], d)
            slack = np.repeat(d / 2, 32, axis=1)  # rounding to int8
            out = reference.matmul_q8(down_type, expert.down, q[pairs], d)
        else:
            gate = reference.matmul_f32(gate_type, expert.gate, x[rows])
            up = reference.matmul_f32(up_type, expert.up, x[rows])
            restored, slack = values[pairs].astype(np.float64), np.zeros(1)
            out = reference.matmul_f32(down_type, expert.down, values[pairs])
        expected = reference.silu_mul(gate, up)
        errors = np.maximum(np.abs(restored - expected) - slack, 0), np.abs(found[pairs] - out)
        worst = [max(w, error.max()) for w, error in zip(worst, errors, strict=True)]
        largest = [max(m, np.abs(v).max()) for m, v in zip(largest, (expected, out), strict=True)]
    assert worst[0] <= 4e-6 * largest[0]  # two products of sums, an exp
    assert worst[1] <= 2e-6 * largest[1]  # sums of K products in float32


def check_combine(gpu, memory, grouped, shape, routed):
    rng, (weights, outputs, out) = np.random.default_rng(4), routed
    tokens, hidden = len(weights), outputs.shape[1]
    shared, before = (rng.standard_normal((tokens, hidden), np.float32) for _ in range(2))
    scale, x = rng.standard_normal(tokens, np.float32), memory.put(before)
    added = prompt_experts.Shared(memory.put(shared), memory.put(scale))
    gpu.launch(
        prompt_experts.combine(
            gpu, grouped.chunk, shape, grouped.pairs, (memory.put(weights), out), added, x
        )
    )
    expected = reference.reduce_pairs(outputs, grouped.place, weights)
    expected = reference.add3(expected, shared * reference.sigmoid(scale)[:, None], before)
    whole = memory.take(x)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    sums, x = memory.put(np.full_like(before, np.nan)), memory.put(before)
    pairs = grouped.pairs, (memory.put(weights), out)
    gpu.launch(prompt_experts.combine(gpu, grouped.chunk, shape, *pairs, None, sums))
    gpu.launch(prompt_experts.add_shared(gpu, grouped.chunk, hidden, sums, added, x))
    np.testing.assert_array_equal(memory.take(x), whole)
