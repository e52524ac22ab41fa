"""Launches of a MoE layer's decode step: scores and shared expert, routed experts, their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from fomoe.errors import DeviceError
from fomoe.gguf.quants import GGMLType
from fomoe.kernels.gpu.arena import aligned
from fomoe.kernels.gpu.arguments import pointers
from fomoe.kernels.gpu.gpu import GPU
from fomoe.kernels.gpu.launch import Launch
from fomoe.kernels.gpu.matrices import ExpertLayout, Matrix
from fomoe.kernels.gpu.products import DEFAULT, Options, project
from fomoe.kernels.gpu.step import Rows, picks
from fomoe.kernels.gpu.tuning import RowShape, Tuning, fit, group_bytes, tuning_of

_ROUTED, _SHARED = 1, 2  # FM_PARTS of experts_out.hip
_MOST_PICKS = 32  # bits of `MoEBuffers.late`


class Turn(IntEnum):
    """Which of a token's experts `experts_in` computes: FM_TURN of experts.h.

    HITS leaves out those that are late, LATE computes them alone.
    """

    ALL = 0
    HITS = 1
    LATE = 2


@dataclass(frozen=True, slots=True)
class SharedMatrices:
    """The shared expert: gate, up [F, D] and the vector [1, D] of its weight's logit."""

    gate: Matrix
    up: Matrix
    scale: Matrix


@dataclass(frozen=True, slots=True)
class MoEBuffers:
    """Device addresses of what the launches of a layer leave to each other.

    Attributes:
        h: the experts' input [D] in all forms.
        scores: router scores float32 [E].
        gate: the shared expert's gate h, float32 [F shared].
        up: its up h, float32 [F shared].
        scale: the logit of its weight, float32 [1].
        inner: silu(gate h) * (up h) of the routed experts, float32 [K, F].
        late: uint32 [1], for turns: bit i says that the bytes of the i-th pick may be on their way.
    """

    h: Rows
    scores: int
    gate: int
    up: int
    scale: int
    inner: int
    late: int = 0


@dataclass(frozen=True, slots=True)
class Resident:
    """Where the experts of a layer lie.

    `table` is the address of uint64 [n_experts]: the slots' base addresses.
    """

    table: int
    n_experts: int


def scores(
    gpu: GPU, x: int, norm: tuple[int, float], router: Matrix, shared: SharedMatrices,
    out: MoEBuffers, *, options: Options = DEFAULT,
) -> Launch:  # fmt: skip
    """Return what needs the layer's input alone: h, router scores, the shared expert's first half.

    `norm` is the address of the norm's weight and its epsilon.
    """
    parts = [
        (router, out.scores),
        (shared.gate, out.gate),
        (shared.up, out.up),
        (shared.scale, out.scale),
    ]
    return project(gpu, x, *norm, parts, keep=out.h, options=options)


def experts_in(
    gpu: GPU, layout: ExpertLayout, picked: tuple[int, int], buffers: MoEBuffers, *,
    resident: Resident | None = None, turn: Turn = Turn.ALL, options: Options = DEFAULT,
) -> Launch:  # fmt: skip
    """Return inner = silu(gate h) * (up h) of experts in `picked`: top_k and the picks' address.

    With `resident` the kernel takes the top-k of the scores itself and writes the picks: by score
    descending, then by lower id; weights are the softmax over the chosen ones. In the LATE turn it
    takes from there where the late ones lie by now, and writes that.

    Raises:
        DeviceError: gate and up differ in type, or turns are wanted of more than 32 experts.
    """
    top_k, picks_address = picked
    if turn and top_k > _MOST_PICKS:
        raise DeviceError(f"turns of {top_k} experts: {_MOST_PICKS} is the most")
    if layout.types[0] != layout.types[1]:
        names = [GGMLType(t).name for t in layout.types[:2]]
        raise DeviceError(f"experts with gate {names[0]} and up {names[1]}: GPUs want one type")
    shape = RowShape(GGMLType(layout.types[0]), layout.hidden, options.int8)
    wanted = options.tuning or tuning_of(gpu.runtime, "experts_in", layout.types[0])
    plan = _plan(gpu, [shape], _pick_bytes(top_k) + shape.input_bytes, wanted)
    defines = _expert_defines(layout, top_k, plan, options)
    defines |= {
        "FM_TYPE_IN": layout.types[0],
        "FM_EXPERTS": resident.n_experts if resident and turn != Turn.LATE else 0,
    }
    if turn:
        defines["FM_TURN"] = int(turn)
    wave = gpu.runtime.wave
    sets = top_k * -(-layout.width // shape.rows(wave, wanted.tile))
    groups = min(gpu.runtime.cores * plan.tuning.per_core, sets)
    table = resident.table if resident else 0
    source = pointers(buffers.scores, table, *layout.offsets[1:], buffers.late)
    kernel = gpu.kernel("experts_in", "experts_in", defines)
    args = [*buffers.h, picks_address, buffers.inner, source]
    threads, early = plan.tuning.waves * wave, plan.tuning.early
    return Launch(kernel, groups, threads, plan.shared_bytes, args, early)


def experts_out(
    gpu: GPU, layout: ExpertLayout, picked: tuple[int, int], shared_down: Matrix | None,
    buffers: MoEBuffers, x: int, *, options: Options = DEFAULT,
) -> Launch:  # fmt: skip
    """Return x = (sum of weight * down inner, ascending by id, + shared expert) + x, float32 [D].

    `picked` is top_k and the address of the picks. The routed sum is a chain of fma from zero; the
    shared expert's output is multiplied with the sigmoid of its logit. Without `shared_down` x is
    the routed sum alone, and `shared_out` does the rest.
    """
    top_k, picks_address = picked
    wave = gpu.runtime.wave
    routed = RowShape(GGMLType(layout.types[2]), layout.width, options.int8)
    shared = routed if shared_down is None else _row_shape(shared_down, options)
    wanted = options.tuning or tuning_of(gpu.runtime, "experts_out", layout.types[2])
    side = max(shape.rows(wave, wanted.tile) for shape in (routed, shared))
    rows = -(-layout.hidden // (gpu.runtime.cores * wanted.per_core * side)) * side
    inputs = _pick_bytes(top_k) + aligned(4 * ((top_k + 2) * rows + 1), 16)
    inputs += top_k * routed.input_bytes + (shared.input_bytes if shared_down else 0)
    plan = _plan(gpu, [routed, shared], inputs, wanted)
    defines = _expert_defines(layout, top_k, plan, options)
    defines |= {
        "FM_ROWS": rows,
        "FM_TYPE_DOWN": layout.types[2],
        "FM_SHARED_WIDTH": shared.cols,
        "FM_TYPE_SHARED": int(shared.qtype),
        "FM_PARTS": _ROUTED | _SHARED if shared_down else _ROUTED,
    }
    kernel = gpu.kernel("experts_out", "experts_out", defines)
    down = shared_down.address if shared_down else 0
    second = pointers(buffers.gate, buffers.up, buffers.scale, down)
    groups = -(-layout.hidden // rows)
    threads, early = plan.tuning.waves * wave, plan.tuning.early
    args = [picks_address, buffers.inner, second, x]
    return Launch(kernel, groups, threads, plan.shared_bytes, args, early)


def shared_out(
    gpu: GPU, layout: ExpertLayout, sums: int, shared_down: Matrix, buffers: MoEBuffers, x: int, *,
    options: Options = DEFAULT,
) -> Launch:  # fmt: skip
    """Return x = (sums + shared expert) + x, with the routed `sums` float32 [D] of `experts_out`.

    The two together have the bits of the one launch: `layout` is that of the routed experts, by
    which all of it is tuned.
    """
    wave, shape = gpu.runtime.wave, _row_shape(shared_down, options)
    wanted = options.tuning or tuning_of(gpu.runtime, "experts_out", layout.types[2])
    side = shape.rows(wave, wanted.tile)
    rows = -(-layout.hidden // (gpu.runtime.cores * wanted.per_core * side)) * side
    inputs = _pick_bytes(1) + aligned(4 * (3 * rows + 1), 16) + shape.input_bytes
    plan = _plan(gpu, [shape], inputs, wanted)
    of_routed = {"FM_WIDTH": shape.cols, "FM_TYPE_DOWN": int(shape.qtype)}  # of nothing
    defines = _expert_defines(layout, 1, plan, options) | of_routed
    defines |= {
        "FM_ROWS": rows,
        "FM_SHARED_WIDTH": shape.cols,
        "FM_TYPE_SHARED": int(shape.qtype),
        "FM_PARTS": _SHARED,
    }
    kernel = gpu.kernel("experts_out", "experts_out", defines)
    second = pointers(buffers.gate, buffers.up, buffers.scale, shared_down.address)
    args = [0, sums, second, x]
    threads, early = plan.tuning.waves * wave, plan.tuning.early
    return Launch(kernel, -(-layout.hidden // rows), threads, plan.shared_bytes, args, early)


def _row_shape(matrix: Matrix, options: Options) -> RowShape:
    return RowShape(GGMLType(matrix.type), matrix.cols, options.int8)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Tuning that fits the device, and the shared memory that it takes."""

    tuning: Tuning
    stage_bytes: int
    shared_bytes: int


def _plan(gpu: GPU, shapes: Sequence[RowShape], input_bytes: int, wanted: Tuning) -> _Plan:
    stage = max(shape.stage_bytes(gpu.runtime.wave, wanted.tile) for shape in shapes)
    tuning = fit(wanted, gpu.runtime, input_bytes, stage)
    shared_bytes = input_bytes + tuning.waves * tuning.stages * stage
    return _Plan(tuning, stage, group_bytes(tuning, gpu.runtime, shared_bytes))


def _expert_defines(
    layout: ExpertLayout, top_k: int, plan: _Plan, options: Options
) -> dict[str, int]:
    return {
        **plan.tuning.defines(plan.stage_bytes),
        "FM_INT8": int(options.int8),
        "FM_PARTIAL": int(options.partial),
        "FM_HIDDEN": layout.hidden,
        "FM_WIDTH": layout.width,
        "FM_K": top_k,
    }


def _pick_bytes(top_k: int) -> int:
    return aligned(picks(top_k).itemsize, 16)
