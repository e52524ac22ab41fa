"""The launches of one token through a layer: its front up to the router's scores, and its back."""

from __future__ import annotations

from dataclasses import dataclass

from fomoe.kernels.gpu import moe
from fomoe.kernels.gpu.attention import AttendCall, AttendInputs, AttendWeights, attend
from fomoe.kernels.gpu.delta import DeltaCall, DeltaInputs, DeltaWeights, delta
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.matrices import ExpertLayout
from fomoe.kernels.gpu.moe import Resident, SharedMatrices, Turn
from fomoe.kernels.gpu.products import Options, Part, project, project_rows
from fomoe.kernels.gpu.state import DeltaPlace, KVPlace
from fomoe.kernels.gpu.step import Rows
from fomoe.model.gpu.program import Step
from fomoe.model.gpu.slots import ExpertSlots
from fomoe.model.gpu.weights import (
    AttentionMatrices,
    DeltaMatrices,
    LayerMatrices,
    RouterMatrices,
)
from fomoe.model.gpu.work import Work, attention_parts, delta_parts, form, starts
from fomoe.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Desk:
    """What the builders of a device's launches share.

    Attributes:
        step: address of the step block.
        turns: address of the rotation's turns, see `rope_turns`.
    """

    gpu: GPU
    spec: ModelSpec
    int8: bool
    tokens: int
    work: Work
    step: int
    turns: int


def delta_call(desk: Desk, weights: DeltaMatrices, place: DeltaPlace) -> DeltaCall:
    """Return what a DeltaNet layer's kernels compute with, for one token or a prompt."""
    inputs = starts(desk.work.inputs, delta_parts(desk.spec), desk.tokens)
    return DeltaCall(
        DeltaWeights(weights.conv, weights.decay, weights.dt_bias, weights.out_norm, desk.spec.eps),
        DeltaInputs(*inputs),
        place,
        form(desk.work.mixed, weights.output.type, int8=desk.int8),
    )


def attend_call(desk: Desk, weights: AttentionMatrices, place: KVPlace) -> AttendCall:
    """Return what an attention layer's kernels compute with, for one token or a prompt."""
    inputs = starts(desk.work.inputs, attention_parts(desk.spec), desk.tokens)
    return AttendCall(
        AttendWeights(weights.q_norm, weights.k_norm, desk.turns, desk.spec.eps),
        AttendInputs(*inputs),
        place,
        form(desk.work.mixed, weights.output.type, int8=desk.int8),
    )


def _mixer(
    desk: Desk, mixer: AttentionMatrices | DeltaMatrices, place: DeltaPlace | KVPlace
) -> tuple[list[Part], Step, Rows]:
    """Return the mixer's projections, its launch, and the rows that it leaves."""
    gpu, spec = desk.gpu, desk.spec
    if isinstance(mixer, DeltaMatrices):
        assert isinstance(place, DeltaPlace)
        delta_of = delta_call(desk, mixer, place)
        mixed = Step("delta", delta(gpu, desk.step, spec.delta, delta_of))
        return list(zip(mixer.inputs, delta_of.inputs, strict=True)), mixed, delta_of.out
    assert isinstance(place, KVPlace)
    attend_of = attend_call(desk, mixer, place)
    mixed = Step("attend", attend(gpu, desk.step, spec.attention, attend_of))
    return list(zip(mixer.inputs, attend_of.inputs, strict=True)), mixed, attend_of.out


def decode_front(desk: Desk, weights: LayerMatrices, place: DeltaPlace | KVPlace) -> list[Step]:
    """Return four launches: projections, mixer, its output, scores and the shared expert's half."""
    gpu, work, eps, options = desk.gpu, desk.work, desk.spec.eps, Options(int8=desk.int8)
    mixer, dense = weights.mixer, weights.moe
    parts, mixed, rows = _mixer(desk, mixer, place)
    shared = SharedMatrices(dense.gate, dense.up, dense.scale)
    into = project(gpu, work.x, mixer.norm, eps, parts, options=options)
    out = project_rows(gpu, rows, mixer.output, work.x, options=options)
    norm = dense.norm, eps
    scores = moe.scores(gpu, work.x, norm, dense.router, shared, work.moe, options=options)
    return [Step("mixer in", into), mixed, Step("mixer out", out), Step("scores", scores)]


def look_ahead(desk: Desk, router: RouterMatrices, out: int) -> Launch:
    """Return the launch of a later layer's router on the residual stream, float32 [E] at `out`."""
    parts, options = [(router.router, out)], Options(int8=desk.int8)
    return project(desk.gpu, desk.work.x, router.norm, desk.spec.eps, parts, options=options)


def decode_back(
    desk: Desk, weights: LayerMatrices | None, slots: ExpertSlots, layer: int, picks: int, *,
    choose: bool, partial: bool = False,
) -> list[Step]:  # fmt: skip
    """Return two launches: experts in, experts out with shared expert and residual.

    `picks` is the address of the layer's `step.picks`; with `choose` the device writes them, with
    `partial` those without an address are not of this device. Without `weights` the stream becomes
    the sum of the routed experts alone, for `decode_close`.
    """
    into = _experts_in(desk, slots, layer, picks, from_table=choose, partial=partial)
    return [into, _experts_out(desk, weights, slots, layer, picks, partial=partial)]


def decode_hits(
    desk: Desk, slots: ExpertSlots, layer: int, picks: int, *, choose: bool
) -> list[Step]:
    """Return the first launch of `decode_back` without the late experts."""
    return [_experts_in(desk, slots, layer, picks, from_table=choose, turn=Turn.HITS)]


def decode_late(
    desk: Desk, weights: LayerMatrices | None, slots: ExpertSlots, layer: int, picks: int
) -> list[Step]:
    """Return what is left of `decode_back` after `decode_hits`, in two launches."""
    into = _experts_in(desk, slots, layer, picks, from_table=True, turn=Turn.LATE)
    return [into, _experts_out(desk, weights, slots, layer, picks)]


def _experts_in(
    desk: Desk, slots: ExpertSlots, layer: int, picks: int, *, from_table: bool,
    turn: Turn = Turn.ALL, partial: bool = False,
) -> Step:  # fmt: skip
    options, layout = Options(int8=desk.int8, partial=partial), slots.layout(layer)
    moe_of = desk.spec.moe
    resident = Resident(slots.row_address(layer), moe_of.n_experts) if from_table else None
    return Step("experts in", moe.experts_in(
        desk.gpu, layout, (moe_of.top_k, picks), desk.work.moe, resident=resident, turn=turn,
        options=options,
    ))  # fmt: skip


def _experts_out(
    desk: Desk, weights: LayerMatrices | None, slots: ExpertSlots, layer: int, picks: int, *,
    partial: bool = False,
) -> Step:  # fmt: skip
    work, options = desk.work, Options(int8=desk.int8, partial=partial)
    picked, down = (desk.spec.moe.top_k, picks), None if weights is None else weights.moe.down
    return Step("experts out", moe.experts_out(
        desk.gpu, slots.layout(layer), picked, down, work.moe, work.x, options=options
    ))  # fmt: skip


def decode_close(desk: Desk, weights: LayerMatrices, layout: ExpertLayout) -> Step:
    """Return the launch of the shared expert, with the routed sum of another process."""
    work, options = desk.work, Options(int8=desk.int8)
    return Step("shared out", moe.shared_out(
        desk.gpu, layout, work.sums, weights.moe.down, work.moe, work.x, options=options
    ))  # fmt: skip
