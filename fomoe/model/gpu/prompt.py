"""The launches of a prompt's chunk through a layer; T is read from the step block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fomoe.gguf.quants import GGMLType
from fomoe.kernels.gpu import prompt, prompt_experts
from fomoe.kernels.gpu.attention import attend_chunk
from fomoe.kernels.gpu.delta import delta_chunk
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.matrices import ExpertLayout
from fomoe.kernels.gpu.picking import choose_rows
from fomoe.kernels.gpu.prompt import Chunk, Norm
from fomoe.kernels.gpu.prompt_experts import Experts, PairRows, Pairs, Shared
from fomoe.kernels.gpu.state import DeltaPlace, KVPlace
from fomoe.kernels.gpu.step import Rows
from fomoe.model.gpu.decode import Desk, attend_call, delta_call
from fomoe.model.gpu.program import Step
from fomoe.model.gpu.slots import ExpertSlots
from fomoe.model.gpu.weights import AttentionMatrices, DeltaMatrices, LayerMatrices


@dataclass(frozen=True, slots=True)
class Bucket:
    """Launches for passes of up to `tokens` tokens, and what they sort pairs with.

    `pairs` goes by the types of a layer's experts: layers of one layout share it.
    """

    chunk: Chunk
    pairs: dict[tuple[int, int, int], Pairs]

    @property
    def tokens(self) -> int:
        """Tokens of the longest pass."""
        return self.chunk.tokens


def _mixer(
    desk: Desk,
    mixer: AttentionMatrices | DeltaMatrices,
    place: DeltaPlace | KVPlace,
    chunk: tuple[int, int],
) -> tuple[tuple[int, ...], list[Step], Rows]:
    """Return where the mixer's projections go, its launches, and the rows that it leaves."""
    gpu, spec = desk.gpu, desk.spec
    if isinstance(mixer, DeltaMatrices):
        assert isinstance(place, DeltaPlace)
        delta_of = delta_call(desk, mixer, place)
        launches = delta_chunk(gpu, desk.step, spec.delta, delta_of, chunk)
        return tuple(delta_of.inputs), _named("delta", launches), delta_of.out
    assert isinstance(place, KVPlace)
    attend_of = attend_call(desk, mixer, place)
    launches = attend_chunk(gpu, desk.step, spec.attention, attend_of, chunk, half=desk.int8)
    return tuple(attend_of.inputs), _named("attend", launches), attend_of.out


def prompt_front(
    desk: Desk, bucket: Bucket, weights: LayerMatrices, place: DeltaPlace | KVPlace
) -> list[Step]:
    """Return the launches up to the router's scores [T, E]."""
    gpu, work, chunk = desk.gpu, desk.work, bucket.chunk
    mixer, dense = weights.mixer, weights.moe
    outs, mixed, rows = _mixer(desk, mixer, place, (bucket.tokens, work.scratch))
    inputs = list(zip(mixer.inputs, outs, strict=True))
    into = prompt.matmuls(gpu, chunk, work.moe.h, inputs)
    router = prompt.matmul(gpu, chunk, work.moe.h, dense.router, work.moe.scores)
    return [
        Step("norm", _norm(desk, chunk, mixer.norm)),
        *_named("mixer in", into),
        *mixed,
        Step("mixer out", prompt.matmul(gpu, chunk, rows, mixer.output, work.x, add=True)),
        Step("norm", _norm(desk, chunk, dense.norm)),
        Step("router", router),
    ]


def prompt_choose(desk: Desk, bucket: Bucket, ids: int) -> Step:
    """Return the launch that chooses by the scores: ids int32 [T, K], weights into `Work`."""
    moe, work = desk.spec.moe, desk.work
    sizes = bucket.tokens, moe.n_experts, moe.top_k
    out = ids, work.weights
    return Step("choose", choose_rows(desk.gpu, desk.step, sizes, work.moe.scores, out))


def prompt_back(
    desk: Desk, bucket: Bucket, weights: LayerMatrices | None, slots: ExpertSlots, layer: int,
    ids: int,
) -> list[Step]:  # fmt: skip
    """Return the launches from ids int32 [T, K], ascending, and weights to the residual stream.

    Without `weights`, here and below, it becomes the sums of the routed experts alone, for
    `prompt_close`.
    """
    table, layout = slots.row_address(layer), slots.layout(layer)
    return [
        *prompt_gather(desk, bucket, weights, layout, ids),
        *prompt_wave(desk, bucket, layout, table),
        prompt_combine(desk, bucket, layout, has_shared=weights is not None),
    ]


def prompt_gather(
    desk: Desk, bucket: Bucket, weights: LayerMatrices | None, layout: ExpertLayout, ids: int
) -> list[Step]:
    """Return the launches of the shared expert, and those that sort the pairs by expert."""
    experts, pairs = _experts(desk, layout), bucket.pairs[layout.types]
    group = prompt_experts.group_pairs(desk.gpu, bucket.chunk, experts, ids, pairs)
    return [
        *([] if weights is None else _shared(desk, bucket, weights)), *_named("group", group)
    ]  # fmt: skip


def _shared(desk: Desk, bucket: Bucket, weights: LayerMatrices) -> list[Step]:
    """Return the launches of the shared expert, without its weight."""
    gpu, work, chunk, dense = desk.gpu, desk.work, bucket.chunk, weights.moe
    shared_types = dense.gate.type, dense.up.type, dense.down.type
    shared_in = _of_types(chunk, work.shared_hidden, shared_types)
    alike = replace(chunk, int8=chunk.is_int8(*shared_types))
    return [
        Step("shared in", prompt.swiglu(gpu, alike, work.moe.h, dense.gate, dense.up, shared_in)),
        Step("shared out", prompt.matmul(gpu, alike, shared_in, dense.down, work.shared_out)),
        Step("shared scale", _scale(desk, chunk, weights)),
    ]


def prompt_wave(desk: Desk, bucket: Bucket, layout: ExpertLayout, table: int) -> list[Step]:
    """Return the launches of all pairs whose experts have addresses in uint64 [3, E] at `table`."""
    gpu, work, chunk = desk.gpu, desk.work, bucket.chunk
    hidden = _of_types(chunk, work.pair_hidden, layout.types)
    h = _of_types(chunk, work.moe.h, layout.types)
    into, out = prompt_experts.experts_chunk(
        gpu, chunk, _experts(desk, layout), bucket.pairs[layout.types], table, h,
        PairRows(hidden, work.pair_out),
    )  # fmt: skip
    return [Step("experts in", into), Step("experts out", out)]


def prompt_close(desk: Desk, bucket: Bucket, weights: LayerMatrices) -> list[Step]:
    """Return the launches of the shared expert, with the routed sums of another process."""
    work, shared = desk.work, Shared(desk.work.shared_out, desk.work.moe.scale)
    add = prompt_experts.add_shared(
        desk.gpu, bucket.chunk, desk.spec.hidden, work.sums, shared, work.x
    )
    return [*_shared(desk, bucket, weights), Step("add", add)]


def prompt_combine(desk: Desk, bucket: Bucket, layout: ExpertLayout, *, has_shared: bool) -> Step:
    """Return the launch that adds all pairs, ascending, and the shared expert to the stream."""
    work = desk.work
    shared = Shared(work.shared_out, work.moe.scale) if has_shared else None
    return Step("combine", prompt_experts.combine(
        desk.gpu, bucket.chunk, _experts(desk, layout), bucket.pairs[layout.types],
        (work.weights, work.pair_out), shared, work.x,
    ))  # fmt: skip


def _experts(desk: Desk, layout: ExpertLayout) -> Experts:
    return Experts(layout, desk.spec.moe.n_experts, desk.spec.moe.top_k)


def _norm(desk: Desk, chunk: Chunk, weight: int) -> Launch:
    spec, work = desk.spec, desk.work
    norm = Norm(weight, spec.hidden, spec.eps)
    return prompt.norm_rows(desk.gpu, chunk, work.x, norm, _forms(work.moe.h, int8=desk.int8))


def _scale(desk: Desk, chunk: Chunk, weights: LayerMatrices) -> Launch:
    gpu, work, scale = desk.gpu, desk.work, weights.moe.scale
    if scale.type == GGMLType.F32:
        return prompt.dot_rows(gpu, chunk, work.moe.h, scale.address, scale.cols, work.moe.scale)
    return prompt.matmul(gpu, chunk, work.moe.h, scale, work.moe.scale)


def _of_types(chunk: Chunk, rows: Rows, types: Sequence[int]) -> Rows:
    """Return the form of rows that experts of these types take."""
    return Rows(0, rows.q, rows.s) if chunk.is_int8(*types) else Rows(rows.x, 0, 0)


def _forms(rows: Rows, *, int8: bool) -> Rows:
    return rows if int8 else Rows(rows.x, 0, 0)


def _named(name: str, launches: Sequence[Launch]) -> list[Step]:
    return [Step(name, launch) for launch in launches]
