"""How much memory a device needs for its part of a model, before any device is asked."""

from __future__ import annotations

from collections.abc import Sequence

from fomoe.gguf.extents import ExpertTable
from fomoe.gguf.reader import GGUFFile
from fomoe.kernels.gpu.arena import ALIGN, aligned
from fomoe.kernels.gpu.attention import MOST_SPLITS
from fomoe.kernels.gpu.prompt_experts import PAIR_CHUNK
from fomoe.kernels.gpu.state import TILE
from fomoe.kernels.gpu.step import picks
from fomoe.model.gpu.options import HostOptions
from fomoe.model.gpu.passes import bucket_sizes
from fomoe.model.gpu.slots import expert_layout, slot_bytes
from fomoe.model.gpu.states import state_layout
from fomoe.model.gpu.weights import ROUTER_PARTS
from fomoe.model.gpu.work import work_bytes
from fomoe.model.spec import ModelSpec

_LEAST_TILE = 16  # tokens
_SMALL_BYTES = 256 << 10  # step blocks, counters, what kernels leave for their last group


def planned_bytes(file: GGUFFile, spec: ModelSpec, options: HostOptions) -> int:
    """Return what weights, states and work take of an arena, rounded up; no expert slots."""
    options.check(spec)
    total = work_bytes(spec, options) + _mail_bytes(spec, options) + _SMALL_BYTES
    if options.is_dense:
        total += options.n_states * aligned(state_layout(spec, options).nbytes)
        total += _dense_bytes(file, spec, options) + _mixer_bytes(spec, options)
    if options.has_experts:
        total += _pair_bytes(file, spec, options)
    return total


def resident_bytes(file: GGUFFile, spec: ModelSpec, options: HostOptions) -> int:
    """Return what slots for every expert of the hosted layers take beside that."""
    table = ExpertTable.from_gguf(file, spec.n_layers)
    classes = [table.size_class(layer) for layer in options.layers]
    counts = [spec.moe.n_experts * classes.count(c) for c in range(len(table.classes))]
    return slots_bytes(file, spec, options, counts)


def slots_bytes(
    file: GGUFFile, spec: ModelSpec, options: HostOptions, counts: Sequence[int]
) -> int:
    """Return what `counts[c]` slots of each size class take beside that."""
    table = ExpertTable.from_gguf(file, spec.n_layers)
    stride = [0] * len(table.classes)
    for layer in options.layers:
        stride[table.size_class(layer)] = slot_bytes(expert_layout(table, spec, layer))
    slots = sum(count * size for count, size in zip(counts, stride, strict=True))
    return slots + ALIGN * len(table.classes)


def _dense_bytes(file: GGUFFile, spec: ModelSpec, options: HostOptions) -> int:
    hosted = {f"blk.{layer}" for layer in options.layers}
    total = 0
    for name, info in file.tensors.items():
        block = ".".join(name.split(".")[:2])
        if block in hosted and "_exps." not in name:
            total += aligned(info.nbytes)
    if options.ahead:
        beyond = {layer + 1 for layer in options.layers} - {*options.layers, spec.n_layers}
        names = (f"blk.{layer}.{part}.weight" for layer in beyond for part in ROUTER_PARTS)
        total += sum(aligned(file.tensors[name].nbytes) for name in names)
    tied = "output.weight" not in file.tensors
    embedding = aligned(file.tensors["token_embd.weight"].nbytes)
    head = embedding if tied else aligned(file.tensors["output.weight"].nbytes)
    total += embedding if options.embedding else 0
    total += head if options.head and not (tied and options.embedding) else 0
    return total + aligned(4 * spec.hidden)


def _mail_bytes(spec: ModelSpec, options: HostOptions) -> int:
    moe, n_layers = spec.moe, len(options.layers)
    ids = 4 * n_layers * moe.top_k * (options.max_tokens if options.has_experts else 1)
    table = 3 * 8 * (n_layers + 1) * moe.n_experts + ALIGN + 4 * moe.n_experts
    small = 4 * options.max_tokens, n_layers * picks(moe.top_k).itemsize, 4 * moe.n_experts
    return sum(map(aligned, (ids, table, *small)))


def _mixer_bytes(spec: ModelSpec, options: HostOptions) -> int:
    """Bytes that decode kernels of mixers keep for their last group."""
    a, d = spec.attention, spec.delta
    splits = min(MOST_SPLITS, -(-options.ctx_size // TILE))
    attention = aligned(4 * a.n_heads * splits * (a.head_dim + 2)) + aligned(4 * a.n_heads)
    delta = aligned(4 * d.inner) + aligned(4 * d.n_v_heads)
    kinds = [spec.layers[layer] for layer in options.layers]
    return attention * kinds.count("attention") + delta * kinds.count("delta")


def _pair_bytes(file: GGUFFile, spec: ModelSpec, options: HostOptions) -> int:
    table, moe = ExpertTable.from_gguf(file, spec.n_layers), spec.moe
    n_layouts = len({expert_layout(table, spec, layer).types for layer in options.layers})
    total = 0
    for tokens in bucket_sizes(options.max_tokens):
        pairs = tokens * moe.top_k
        tiles = min(moe.n_experts, pairs) + pairs // _LEAST_TILE
        before = -(-tokens // PAIR_CHUNK) * moe.n_experts
        sizes = before, 1, 1, 2 * tiles, moe.n_experts + 1, pairs, pairs
        total += sum(aligned(4 * size) for size in sizes)
    return n_layouts * total
