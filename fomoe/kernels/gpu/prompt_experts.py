"""The routed experts of a prompt's tokens: grouped by expert, then one product per kind of matrix.

All sizes are fixed at build time by the most tokens of a pass; what a pass needs is found on the
device, and groups without work end at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fomoe.errors import DeviceError
from fomoe.gguf.quants import GGMLType
from fomoe.kernels.gpu.arguments import pointers
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.matrices import ExpertLayout
from fomoe.kernels.gpu.prompt import Chunk, ceil_div, product_defines, room_of
from fomoe.kernels.gpu.prompt_tiles import AnyTile, expert_tiles, float_tile_of_halves
from fomoe.kernels.gpu.step import Rows

PAIR_CHUNK = 64  # tokens that one group of count_pairs and place_pairs takes
_MOST_THREADS = 1024
_COMBINE_THREADS = 256
# Out of experts, leaving out tiles takes these so many registers that a core holds one group only.
_WHOLE_TILES = (GGMLType.Q4_K, GGMLType.Q5_K)


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of a layer: how many there are, how many a token takes, their layout."""

    layout: ExpertLayout
    count: int
    top_k: int


class PairLists(NamedTuple):
    """Device addresses of what grouping writes, as `struct PairLists` has them.

    `before` uint32 [chunks, E] and `finished` uint32 are scratch; `tile_count` uint32; `tiles`
    uint32 [most_tiles, 2] are (expert, first pair); `starts` int32 [E + 1] are each expert's first
    pair; `token_of` int32 [T * K] each pair's token; `place` int32 [T, K] where a token's pair is.
    """

    before: int
    finished: int
    tile_count: int
    tiles: int
    starts: int
    token_of: int
    place: int


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs (token, expert) of a pass in device memory, sorted by expert, then token.

    `tile_in` and `tile_out` are the tiles of the two products, with equally many tokens.
    """

    lists: PairLists
    most_tiles: int
    tile_in: AnyTile
    tile_out: AnyTile


def pair_buffers(gpu: GPU, chunk: Chunk, experts: Experts) -> Pairs:
    """Take the memory for grouping from the arena; layers of one shape may share it."""
    tile_in, tile_out = _tiles(gpu, chunk, experts)
    pairs = chunk.tokens * experts.top_k
    most_tiles = min(experts.count, pairs) + pairs // tile_in.tokens
    sizes = (
        ceil_div(chunk.tokens, PAIR_CHUNK) * experts.count, 1, 1, 2 * most_tiles,
        experts.count + 1, pairs, pairs,
    )  # fmt: skip
    addresses = [gpu.arena.take(4 * size) for size in sizes]
    gpu.runtime.fill(addresses[1], 0, 4, gpu.stream)
    return Pairs(PairLists(*addresses), most_tiles, tile_in, tile_out)


def _tiles(gpu: GPU, chunk: Chunk, experts: Experts) -> tuple[AnyTile, AnyTile]:
    """Return tiles of equally many tokens for the products into and out of the experts."""
    layout = experts.layout
    each = ceil_div(chunk.tokens * experts.top_k, experts.count)
    if not chunk.is_int8(*layout.types):
        tile = float_tile_of_halves(each)
        return tile, tile
    if chunk.tile:
        return chunk.tile, chunk.tile
    return expert_tiles(layout.types, (layout.hidden, layout.width), each, room_of(gpu))


def group_pairs(
    gpu: GPU, chunk: Chunk, experts: Experts, ids: int, pairs: Pairs
) -> tuple[Launch, Launch]:
    """Return the launches that fill `pairs` from ids int32 [T, K], each token's experts differing.

    Raises:
        DeviceError: there are more than 1,024 experts.
    """
    if experts.count > _MOST_THREADS:
        raise DeviceError(f"{experts.count} experts in a layer; the GPU kernels take 1,024")
    threads = max(64, 1 << (experts.count - 1).bit_length())
    defines = {
        "EXPERTS": experts.count, "TOP_K": experts.top_k,
        "TILE_TOKENS": pairs.tile_in.tokens, "THREADS": threads,
    }  # fmt: skip

    def launch(name: str) -> Launch:
        function = gpu.kernel("group_pairs", name, defines)
        args = [chunk.step, ids, pointers(*pairs.lists)]
        return Launch(function, ceil_div(chunk.tokens, PAIR_CHUNK), threads, 0, args)

    return launch("count_pairs"), launch("place_pairs")


class PairRows(NamedTuple):
    """Device memory of the products: `hidden` rows [T * K, F], `out` float32 [T * K, D]."""

    hidden: Rows
    out: int


def experts_chunk(
    gpu: GPU, chunk: Chunk, experts: Experts, pairs: Pairs, addresses: int, h: Rows, rows: PairRows
) -> tuple[Launch, Launch]:
    """Return the launches of down(silu(gate h) * (up h)) for every pair, into `rows.out`.

    `addresses` uint64 [3, E] are those of each expert's gate, up and down blocks; pairs of experts
    whose gate has none are passed over, and keep what is in `rows.out`.
    """
    layout = experts.layout
    gate_up, down = layout.types[:2], (layout.types[2], layout.types[2])
    lists, of_experts = pairs.lists, {"EXPERTS": experts.count}
    tiles = pointers(lists.tile_count, lists.tiles, lists.starts, lists.token_of)

    tile = pairs.tile_in
    defines = product_defines(gate_up, layout.width, layout.hidden, tile)
    function = gpu.kernel("chunk_in", "experts_in", defines | of_experts | {"RAGGED": 1})
    results = pointers(rows.hidden.q, rows.hidden.s, rows.hidden.x)
    args = [tiles, addresses, pointers(h.q, h.s, h.x), results]
    grid = (ceil_div(layout.width, tile.rows // 2), pairs.most_tiles)
    into = Launch(function, grid, tile.threads, defines["SHARED_BYTES"], args)

    tile, ragged = pairs.tile_out, {"RAGGED": int(down[0] not in _WHOLE_TILES)}
    defines = product_defines(down, layout.hidden, layout.width, tile)
    function = gpu.kernel("chunk_out", "experts_out", defines | of_experts | ragged)
    args = [tiles, addresses, results, rows.out]
    grid = (ceil_div(layout.hidden, tile.rows), pairs.most_tiles)
    return into, Launch(function, grid, tile.threads, defines["SHARED_BYTES"], args)


class Shared(NamedTuple):
    """The shared expert's output float32 [T, D] and the logit of its scale float32 [T]."""

    out: int
    scale: int


def combine(
    gpu: GPU, chunk: Chunk, experts: Experts, pairs: Pairs, routed: tuple[int, int],
    shared: Shared | None, x: int,
) -> Launch:  # fmt: skip
    """Return x = (weighted pairs of each token in its ids' order + shared * sigmoid(scale)) + x.

    `routed` are the weights float32 [T, K] and the pairs' outputs [T * K, D]; x float32 [T, D].
    Without `shared` x is the weighted sum alone, and `add_shared` does the rest.
    """
    weights, outputs = routed
    of_shared = shared or Shared(0, 0)
    args = [outputs, pairs.lists.place, weights, *of_shared, x]
    sizes = experts.layout.hidden, experts.top_k
    return _combine(gpu, chunk, sizes, 1 if shared is None else 3, args)


def add_shared(gpu: GPU, chunk: Chunk, hidden: int, sums: int, shared: Shared, x: int) -> Launch:
    """Return x = (sums + shared * sigmoid(scale)) + x, with `sums` float32 [T, D] of `combine`."""
    return _combine(gpu, chunk, (hidden, 0), 2, [sums, 0, 0, *shared, x])


def _combine(gpu: GPU, chunk: Chunk, sizes: tuple[int, int], parts: int, args: list[int]) -> Launch:
    hidden, top_k = sizes
    defines = {"THREADS": _COMBINE_THREADS, "HIDDEN": hidden, "TOP_K": top_k, "PARTS": parts}
    function = gpu.kernel("rows", "combine", defines)
    grid = (ceil_div(hidden // 4, _COMBINE_THREADS), chunk.tokens)
    return Launch(function, grid, _COMBINE_THREADS, 0, [chunk.step, *args])
